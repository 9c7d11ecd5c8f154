"""Adapter of FLUX: diffusers' ``FluxTransformer2DModel``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

from dyexport.backbones.base import Inputs
from dyexport.backbones.dit.masked import DiTTokenRouter
from dyexport.models.gates import BlockGates
from dyexport.models.hooks import on_input, on_output, permute_inputs, permute_outputs, unit_channels, watch_input
from dyexport.models.routers import Fp32Linear, TokenRouter, TokenRouters, fp32_linear

BLOCK_INPUTS = ("hidden_states", "encoder_hidden_states", "temb")
TIMESTEP_SCALE = 1000.0  # the network is called with sigma in [0, 1] and embeds it times this
SINGLE_TARGETS = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")
DOUBLE_TARGETS = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{feed}.{name}" for feed in ("ff", "ff_context") for name in ("net.0.proj", "net.2")),
)


class FluxTokenRouter(TokenRouter):
    """Token router of DyFLUX (arXiv 2504.06803 section 6): a Linear on each image token plus the mean text token.

    Both are normalized by one affine LayerNorm, then modulated by a shift and a scale each, from the conditioning
    that the block's modulation reads (timestep, guidance and pooled text).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear_t = Fp32Linear(channels, 4 * channels)
        self.norm = nn.LayerNorm(channels, eps=1e-5)
        self.router = nn.Linear(channels, 1)

    @property
    def last(self) -> nn.Linear:
        return self.router

    def forward(self, *inputs: Tensor) -> Tensor:
        """Compute image (B, N, C), text (B, T, C), conditioning (B, C) -> logits (B, N)."""
        image, text, conditioning = inputs
        modulation = self.linear_t(F.silu(conditioning.float()))[:, None]  # (B, 1, 4C)
        shift, scale, text_shift, text_scale = modulation.chunk(4, dim=-1)
        image = self._normed(image) * (1 + scale) + shift  # (B, N, C)
        text = self._normed(text) * (1 + text_scale) + text_shift  # (B, T, C)
        return fp32_linear(self.router, image + text.mean(dim=1, keepdim=True)).squeeze(-1)

    def _normed(self, tokens: Tensor) -> Tensor:
        norm = self.norm
        return F.layer_norm(tokens.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)


class FluxAdapter:
    """Backbone adapter for ``FluxTransformer2DModel``.

    In a double block image and text share the gates of heads and of the groups of their two MLPs. Skipped image
    tokens miss the MLP. In a single block attention and MLP share ``proj_out``: skipped image tokens miss all of
    it, including their attention update. Text is never skipped.

    Published token routers (DyFLUX: DyDiT++, arXiv 2504.06803 section 6) have 4 C^2 parameters in each block. Compact
    ones have the form of DiT's, C^2 / 16 parameters, and read the modulated input of the image MLP: it is normalized,
    and follows timestep, guidance and pooled text by the block's own shift and scale. They do not read the text. Not
    in the paper.
    """

    stock = FluxTransformer2DModel
    token_routers: ClassVar[TokenRouters] = {"published": FluxTokenRouter, "compact": DiTTokenRouter}

    def build(self, config: Mapping[str, Any]) -> FluxTransformer2DModel:
        return FluxTransformer2DModel(**config)

    def initialize(self, backbone: FluxTransformer2DModel) -> None:
        """Initialize like DiT: Xavier linears, zero modulation and output (adaLN-Zero)."""
        for module in backbone.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        modulations = [block.norm.linear for block in backbone.single_transformer_blocks]
        for block in backbone.transformer_blocks:
            modulations += [block.norm1.linear, block.norm1_context.linear]
        for layer in (*modulations, backbone.norm_out.linear, backbone.proj_out):
            nn.init.zeros_(layer.weight)

    def share_embedders(self, backbone: FluxTransformer2DModel) -> None:
        """Do nothing: FLUX has one embedder."""

    def run(self, backbone: FluxTransformer2DModel, inputs: Inputs) -> Tensor:
        sample: Tensor = backbone(**inputs).sample  # (B, N, C_out)
        return sample

    def blocks(self, backbone: FluxTransformer2DModel) -> list[nn.Module]:
        return [*backbone.transformer_blocks, *backbone.single_transformer_blocks]

    def attach(self, block: FluxTransformerBlock | FluxSingleTransformerBlock, gates: BlockGates) -> None:
        if isinstance(block, FluxSingleTransformerBlock):
            _attach_single(block, gates)
        else:
            _attach_double(block, gates)

    def lora_targets(self, block: FluxTransformerBlock | FluxSingleTransformerBlock) -> tuple[str, ...]:
        return SINGLE_TARGETS if isinstance(block, FluxSingleTransformerBlock) else DOUBLE_TARGETS

    def timestep_embedding(self, backbone: FluxTransformer2DModel, timestep: Tensor) -> Tensor:
        """Embed t without guidance and pooled text, which blocks read in addition: widths are a function of t."""
        embedder = backbone.time_text_embed
        sinusoid = embedder.time_proj(timestep * TIMESTEP_SCALE)  # (B, 256)
        dtype = embedder.timestep_embedder.linear_1.weight.dtype
        embedding: Tensor = embedder.timestep_embedder(sinusoid.to(dtype))  # (B, C)
        return embedding

    @torch.no_grad()
    def permute_units(self, backbone: FluxTransformer2DModel, block: int, heads: Tensor, groups: Tensor) -> None:
        layer: Any = self.blocks(backbone)[block]
        rows = unit_channels(heads, layer.attn.head_dim)  # (C,)
        for linear in (layer.attn.to_q, layer.attn.to_k, layer.attn.to_v):
            permute_outputs(linear, rows)
        if isinstance(layer, FluxSingleTransformerBlock):
            hidden = unit_channels(groups, layer.mlp_hidden_dim // len(groups))  # (4C,)
            permute_outputs(layer.proj_mlp, hidden)
            permute_inputs(layer.proj_out, torch.cat([rows, len(rows) + hidden]))
        else:
            _permute_double(layer, rows, groups)


def _permute_double(layer: FluxTransformerBlock, rows: Tensor, groups: Tensor) -> None:
    """Permute the rest of a double block; ``rows`` (C,) are the channels of its heads."""
    attention = layer.attn
    for linear in (attention.add_q_proj, attention.add_k_proj, attention.add_v_proj):
        permute_outputs(linear, rows)
    permute_inputs(attention.to_out[0], rows)
    permute_inputs(attention.to_add_out, rows)
    for mlp in (layer.ff, layer.ff_context):
        hidden = unit_channels(groups, mlp.net[0].proj.out_features // len(groups))  # (4C,)
        permute_outputs(mlp.net[0].proj, hidden)
        permute_inputs(mlp.net[2], hidden)


def _attach_double(block: FluxTransformerBlock, gates: BlockGates) -> None:
    for linear in (block.attn.to_out[0], block.attn.to_add_out):
        on_input(linear, gates.heads)
    for mlp in (block.ff, block.ff_context):
        on_output(mlp.net[0].proj, gates.groups)
    if isinstance(gates.router.tokens, FluxTokenRouter):
        reader = _DoubleReader(gates)
        block.register_forward_pre_hook(reader.enter, with_kwargs=True)
        block.norm1_context.register_forward_hook(reader.modulated)
        block.attn.register_forward_hook(reader.attended)
        block.norm2.register_forward_pre_hook(reader.route)
    else:
        watch_input(block.ff, gates.route)  # normed and modulated, (B, N, C)
    on_output(block.ff, gates.tokens)


def _attach_single(block: FluxSingleTransformerBlock, gates: BlockGates) -> None:
    on_output(block.attn, gates.heads)
    on_output(block.proj_mlp, gates.groups)
    if isinstance(gates.router.tokens, FluxTokenRouter):
        block.register_forward_pre_hook(_SingleReader(gates).enter, with_kwargs=True)
    else:
        image = _ImageRows(gates)
        block.register_forward_pre_hook(image.enter, with_kwargs=True)
        watch_input(block.proj_mlp, image.route)
    on_output(block.proj_out, gates.tokens)  # text rows first


def _block_inputs(positional: tuple[Any, ...], named: Mapping[str, Any]) -> list[Tensor]:
    """Return image, text and conditioning of a block, passed by name, or by position when diffusers recomputes."""
    inputs = dict(zip(BLOCK_INPUTS, positional, strict=False)) | dict(named)
    return [inputs[name] for name in BLOCK_INPUTS]


class _ImageRows:
    """Input of a single block's compact token router: the image rows of the MLP's input, which text rows precede."""

    def __init__(self, gates: BlockGates) -> None:
        self.gates = gates
        self.tokens = 0  # N

    def enter(self, block: nn.Module, positional: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        self.tokens = _block_inputs(positional, named)[0].shape[1]

    def route(self, normed: Tensor) -> None:
        self.gates.route(normed[:, -self.tokens :])  # (B, T + N, C) -> (B, N, C)


class _SingleReader:
    """Inputs of a single block's published token router: those of the block."""

    def __init__(self, gates: BlockGates) -> None:
        self.gates = gates

    def enter(self, block: nn.Module, positional: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        self.gates.route(*_block_inputs(positional, named))


class _DoubleReader:
    """Inputs of a double block's published token router: image and text after attention.

    The stock block runs the image MLP before it adds attention to the text, so that hooks collect the terms of
    that sum.
    """

    def __init__(self, gates: BlockGates) -> None:
        self.gates = gates
        self.seen: dict[str, Tensor] = {}

    def enter(self, block: nn.Module, positional: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        _, text, conditioning = _block_inputs(positional, named)
        self.seen = {"text": text, "conditioning": conditioning}

    def modulated(self, norm: nn.Module, _: Any, outputs: tuple[Tensor, ...]) -> None:
        self.seen["gate"] = outputs[1]  # (B, C), of attention

    def attended(self, attention: nn.Module, _: Any, outputs: tuple[Tensor, ...]) -> None:
        self.seen["update"] = outputs[1]  # (B, T, C)

    def route(self, norm: nn.Module, inputs: tuple[Tensor]) -> None:
        text = self.seen["text"] + self.seen["gate"][:, None] * self.seen["update"]  # (B, T, C)
        self.gates.route(inputs[0], text, self.seen["conditioning"])
        self.seen = {}


ADAPTER = FluxAdapter()
