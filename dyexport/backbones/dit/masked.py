"""Adapter of DiT and SiT: diffusers' ``DiTTransformer2DModel``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from dyexport.backbones.base import Inputs
from dyexport.backbones.basic_transformer_block import LORA_TARGETS, attach_gates, permute_block, xavier_linears
from dyexport.backbones.dit.preset import FREQ_SHIFT, STORED_POSITIONS
from dyexport.errors import CheckpointError
from dyexport.models.gates import BlockGates
from dyexport.models.routers import TokenRouter, TokenRouters, fp32_linear


class DiTTokenRouter(TokenRouter):
    """Token router as published (arXiv 2410.03456 section 3.3): Linear -> ReLU -> Linear, with C / 16 inner channels.

    DyDiT's reads the residual after attention. Compact routers of other backbones read the modulated input of the MLP.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 1)
        self.inner = nn.Linear(channels, hidden)
        self.outer = nn.Linear(hidden, 1)

    @property
    def last(self) -> nn.Linear:
        return self.outer

    def forward(self, *inputs: Tensor) -> Tensor:
        """Compute tokens (B, N, C) -> logits (B, N)."""
        (tokens,) = inputs
        return fp32_linear(self.outer, F.relu(fp32_linear(self.inner, tokens))).squeeze(-1)


class DiTAdapter:
    """Backbone adapter for ``DiTTransformer2DModel`` (DiT, arXiv 2212.09748; SiT, arXiv 2401.08740)."""

    stock = DiTTransformer2DModel
    token_routers: ClassVar[TokenRouters] = {"published": DiTTokenRouter}

    def build(self, config: Mapping[str, Any]) -> DiTTransformer2DModel:
        extra = {name: config[name] for name in (FREQ_SHIFT, STORED_POSITIONS) if name in config}
        backbone = DiTTransformer2DModel(**{name: value for name, value in config.items() if name not in extra})
        backbone.register_to_config(**extra)
        shared = backbone.transformer_blocks[0].norm1.emb
        shared.time_proj.downscale_freq_shift = extra.get(FREQ_SHIFT, 1)
        for block in backbone.transformer_blocks:
            block.norm1.emb = shared
        if extra.get(STORED_POSITIONS):
            backbone.pos_embed.register_buffer("pos_embed", backbone.pos_embed.pos_embed, persistent=True)
        return backbone

    def initialize(self, backbone: DiTTransformer2DModel) -> None:
        """Initialize as DiT section 3.2: Xavier linears, N(0, 0.02) embedders, zero modulation and output."""
        xavier_linears(backbone, backbone.pos_embed.proj)
        for block in backbone.transformer_blocks:
            embedder = block.norm1.emb
            nn.init.normal_(embedder.timestep_embedder.linear_1.weight, std=0.02)
            nn.init.normal_(embedder.timestep_embedder.linear_2.weight, std=0.02)
            nn.init.normal_(embedder.class_embedder.embedding_table.weight, std=0.02)
            nn.init.zeros_(block.norm1.linear.weight)
        for layer in (backbone.proj_out_1, backbone.proj_out_2):
            nn.init.zeros_(layer.weight)

    def share_embedders(self, backbone: DiTTransformer2DModel) -> None:
        """Make the timestep and label embedder, which diffusers copies into every block, one module."""
        shared = backbone.transformer_blocks[0].norm1.emb
        reference = shared.state_dict()
        for index, block in enumerate(backbone.transformer_blocks):
            for name, tensor in block.norm1.emb.state_dict().items():
                if not tensor.is_meta and not torch.equal(tensor, reference[name]):
                    raise CheckpointError(
                        f"transformer_blocks.{index}.norm1.emb.{name} differs from block 0's; "
                        "dyexport needs one embedder for all blocks, as in DiT: train with one that they share, or "
                        "store one block's weights under all names"
                    )
            block.norm1.emb = shared

    def run(self, backbone: DiTTransformer2DModel, inputs: Inputs) -> Tensor:
        sample: Tensor = backbone(**inputs).sample  # (B, C_out, H, W)
        return sample

    def blocks(self, backbone: DiTTransformer2DModel) -> list[nn.Module]:
        return list(backbone.transformer_blocks)

    def attach(self, block: BasicTransformerBlock, gates: BlockGates) -> None:
        attach_gates(block, gates, mlp_norm=block.norm3)

    def lora_targets(self, block: BasicTransformerBlock) -> tuple[str, ...]:
        return LORA_TARGETS

    def timestep_embedding(self, backbone: DiTTransformer2DModel, timestep: Tensor) -> Tensor:
        embedder = backbone.transformer_blocks[0].norm1.emb
        sinusoid = embedder.time_proj(timestep)  # (B, 256)
        dtype = embedder.timestep_embedder.linear_1.weight.dtype
        embedding: Tensor = embedder.timestep_embedder(sinusoid.to(dtype))  # (B, C)
        return embedding

    def permute_units(self, backbone: DiTTransformer2DModel, block: int, heads: Tensor, groups: Tensor) -> None:
        permute_block(backbone.transformer_blocks[block], heads, groups)


ADAPTER = DiTAdapter()
