"""Qwen-Image: diffusers' ``QwenImageTransformer2DModel``, seen through the backbone adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from torch import Tensor, nn

from dyexport.backbones.base import Inputs
from dyexport.backbones.dit.masked import DiTTokenRouter
from dyexport.models.gates import BlockGates
from dyexport.models.hooks import on_input, on_output, permute_inputs, permute_outputs, unit_channels, watch_input
from dyexport.models.routers import TokenRouters

PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
TARGETS = (
    *(f"attn.{name}" for name in (*PROJECTIONS, "to_out.0", "to_add_out")),
    *(f"{mlp}.{name}" for mlp in ("img_mlp", "txt_mlp") for name in ("net.0.proj", "net.2")),
)


class QwenImageAdapter:
    """Backbone adapter for ``QwenImageTransformer2DModel``.

    A head gate covers image and text, and so does a gate of an MLP group. Skipped image tokens miss the image MLP;
    text always runs. Token routers have the form of DiT's and read the input of the image MLP.
    """

    stock = QwenImageTransformer2DModel
    token_routers: ClassVar[TokenRouters] = {"compact": DiTTokenRouter}

    def build(self, config: Mapping[str, Any]) -> QwenImageTransformer2DModel:
        return QwenImageTransformer2DModel(**config)

    def initialize(self, backbone: QwenImageTransformer2DModel) -> None:
        """Initialize as DiT: Xavier linears, zero modulation and output (adaLN-Zero)."""
        for module in backbone.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        modulations = [mod[1] for block in backbone.transformer_blocks for mod in (block.img_mod, block.txt_mod)]
        for layer in (*modulations, backbone.norm_out.linear, backbone.proj_out):
            nn.init.zeros_(layer.weight)

    def share_embedders(self, backbone: QwenImageTransformer2DModel) -> None:
        """Do nothing: the stock module has one embedder."""

    def run(self, backbone: QwenImageTransformer2DModel, inputs: Inputs) -> Tensor:
        """Call the stock module; it indexes tables by ``img_shapes``, which must be numbers for that."""
        shapes = [tuple(inputs["img_shapes"].tolist())]
        sample: Tensor = backbone(**{**inputs, "img_shapes": shapes}).sample  # (B, N, C_out)
        return sample

    def blocks(self, backbone: QwenImageTransformer2DModel) -> list[nn.Module]:
        return list(backbone.transformer_blocks)

    def attach(self, block: QwenImageTransformerBlock, gates: BlockGates) -> None:
        for linear in (block.attn.to_out[0], block.attn.to_add_out):
            on_input(linear, gates.heads)
        for mlp in (block.img_mlp, block.txt_mlp):
            on_output(mlp.net[0].proj, gates.groups)
        watch_input(block.img_mlp, gates.route)  # normed and modulated, (B, N, C)
        on_output(block.img_mlp, gates.tokens)

    def lora_targets(self, block: QwenImageTransformerBlock) -> tuple[str, ...]:
        return TARGETS

    def timestep_embedding(self, backbone: QwenImageTransformer2DModel, timestep: Tensor) -> Tensor:
        embedder = backbone.time_text_embed
        sinusoid = embedder.time_proj(timestep)  # (B, 256)
        dtype = embedder.timestep_embedder.linear_1.weight.dtype
        embedding: Tensor = embedder.timestep_embedder(sinusoid.to(dtype))  # (B, C)
        return embedding

    @torch.no_grad()
    def permute_units(self, backbone: QwenImageTransformer2DModel, block: int, heads: Tensor, groups: Tensor) -> None:
        layer = backbone.transformer_blocks[block]
        rows = unit_channels(heads, layer.attention_head_dim)  # (C,)
        for name in PROJECTIONS:
            permute_outputs(getattr(layer.attn, name), rows)
        permute_inputs(layer.attn.to_out[0], rows)
        permute_inputs(layer.attn.to_add_out, rows)
        for mlp in (layer.img_mlp, layer.txt_mlp):
            hidden = unit_channels(groups, mlp.net[0].proj.out_features // len(groups))  # (4C,)
            permute_outputs(mlp.net[0].proj, hidden)
            permute_inputs(mlp.net[2], hidden)


ADAPTER = QwenImageAdapter()
