"""DiT and SiT: diffusers' ``DiTTransformer2DModel``, seen through the backbone adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from dyexport.errors import CheckpointError
from dyexport.models.base import BlockSites

FREQ_SHIFT = "freq_shift"  # config entry: the timestep's frequency i is 10000 ** (-i / (128 - shift)); diffusers has 1
STORED_POSITIONS = "stored_positions"  # config entry: the position table is a weight; diffusers computes it


class DiTAdapter:
    """Backbone adapter for ``DiTTransformer2DModel`` (DiT, arXiv 2212.09748; SiT, arXiv 2401.08740)."""

    def build(self, config: Mapping[str, Any]) -> DiTTransformer2DModel:
        ours = {name: config[name] for name in (FREQ_SHIFT, STORED_POSITIONS) if name in config}
        backbone = DiTTransformer2DModel(**{name: value for name, value in config.items() if name not in ours})
        backbone.register_to_config(**ours)
        shared = backbone.transformer_blocks[0].norm1.emb
        shared.time_proj.downscale_freq_shift = ours.get(FREQ_SHIFT, 1)
        for block in backbone.transformer_blocks:
            block.norm1.emb = shared
        if ours.get(STORED_POSITIONS):
            backbone.pos_embed.register_buffer("pos_embed", backbone.pos_embed.pos_embed, persistent=True)
        return backbone

    def initialise(self, backbone: DiTTransformer2DModel) -> None:
        """DiT section 3.2: Xavier linears, N(0, 0.02) embedders, zero modulation and output (adaLN-Zero)."""
        for module in backbone.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patch = backbone.pos_embed.proj
        nn.init.xavier_uniform_(patch.weight.view(patch.weight.shape[0], -1))
        nn.init.zeros_(patch.bias)
        for block in backbone.transformer_blocks:
            embedder = block.norm1.emb
            nn.init.normal_(embedder.timestep_embedder.linear_1.weight, std=0.02)
            nn.init.normal_(embedder.timestep_embedder.linear_2.weight, std=0.02)
            nn.init.normal_(embedder.class_embedder.embedding_table.weight, std=0.02)
            nn.init.zeros_(block.norm1.linear.weight)
        for layer in (backbone.proj_out_1, backbone.proj_out_2):
            nn.init.zeros_(layer.weight)

    def share_embedders(self, backbone: DiTTransformer2DModel) -> None:
        """DiT has one timestep and label embedder; diffusers stores a copy of it in every block."""
        shared = backbone.transformer_blocks[0].norm1.emb
        reference = shared.state_dict()
        for index, block in enumerate(backbone.transformer_blocks):
            for name, tensor in block.norm1.emb.state_dict().items():
                if not tensor.is_meta and not torch.equal(tensor, reference[name]):
                    raise CheckpointError(
                        f"transformer_blocks.{index}.norm1.emb.{name} differs from block 0's; "
                        "dyexport needs one embedder for all blocks, as in DiT"
                    )
            block.norm1.emb = shared

    def sites(self, backbone: DiTTransformer2DModel) -> list[BlockSites]:
        return [
            BlockSites(
                attention_out=block.attn1.to_out[0], mlp_in=block.ff.net[0].proj, mlp=block.ff, token_input=block.norm3
            )
            for block in backbone.transformer_blocks
        ]

    def timestep_embedding(self, backbone: DiTTransformer2DModel, timestep: Tensor) -> Tensor:
        embedder = backbone.transformer_blocks[0].norm1.emb
        sinusoid = embedder.time_proj(timestep)  # (B, 256)
        dtype = embedder.timestep_embedder.linear_1.weight.dtype
        embedding: Tensor = embedder.timestep_embedder(sinusoid.to(dtype))  # (B, C)
        return embedding

    @torch.no_grad()
    def permute_units(self, backbone: DiTTransformer2DModel, block: int, heads: Tensor, groups: Tensor) -> None:
        layer = backbone.transformer_blocks[block]
        attention, mlp = layer.attn1, layer.ff
        rows = unit_channels(heads, attention.to_q.out_features // len(heads))  # (C,)
        for linear in (attention.to_q, attention.to_k, attention.to_v):
            _permute_outputs(linear, rows)
        attention.to_out[0].weight.copy_(attention.to_out[0].weight[:, rows])
        hidden = unit_channels(groups, mlp.net[0].proj.out_features // len(groups))  # (4C,)
        _permute_outputs(mlp.net[0].proj, hidden)
        mlp.net[2].weight.copy_(mlp.net[2].weight[:, hidden])


def unit_channels(units: Tensor, size: int) -> Tensor:
    """Channel indices of contiguous units of ``size`` channels each: (U,) -> (U * size,)."""
    return (units[:, None] * size + torch.arange(size)).flatten()


def _permute_outputs(linear: nn.Linear, rows: Tensor) -> None:
    linear.weight.copy_(linear.weight[rows])
    if linear.bias is not None:
        linear.bias.copy_(linear.bias[rows])
