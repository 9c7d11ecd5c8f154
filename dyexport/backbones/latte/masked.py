"""Adapter of Latte: diffusers' ``LatteTransformer3DModel``."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any, ClassVar

from diffusers import LatteTransformer3DModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from dyexport.backbones.base import Inputs
from dyexport.backbones.basic_transformer_block import LORA_TARGETS, attach_gates, permute_block, xavier_linears
from dyexport.backbones.dit.masked import DiTTokenRouter
from dyexport.models.gates import BlockGates
from dyexport.models.routers import TokenRouters


class LatteAdapter:
    """Backbone adapter for ``LatteTransformer3DModel`` (Latte, arXiv 2401.03048, its text-to-video model).

    Blocks alternate: a spatial block reads every frame as a row of patches, a temporal one every patch as a
    row of frames. Both have the gates of a DiT block. Attention to the text, which spatial blocks have in
    addition, is static: it is not in the paper's lambda, and a thirteenth of the FLOPs of a pair of blocks. Token
    routers read the residual after it, so skipped tokens have read the text.
    """

    stock = LatteTransformer3DModel
    token_routers: ClassVar[TokenRouters] = {"published": DiTTokenRouter}

    def build(self, config: Mapping[str, Any]) -> LatteTransformer3DModel:
        return LatteTransformer3DModel(**config)

    def initialize(self, backbone: LatteTransformer3DModel) -> None:
        """Initialize like PixArt (arXiv 2310.00426), whose adaLN-single Latte has: zero text attention and output."""
        xavier_linears(backbone, backbone.pos_embed.proj)
        embedder, caption = backbone.adaln_single.emb.timestep_embedder, backbone.caption_projection
        for layer in (embedder, caption):
            nn.init.normal_(layer.linear_1.weight, std=0.02)
            nn.init.normal_(layer.linear_2.weight, std=0.02)
        nn.init.normal_(backbone.adaln_single.linear.weight, std=0.02)
        outputs = [block.attn2.to_out[0] for block in backbone.transformer_blocks]
        for layer in (*outputs, backbone.proj_out):
            nn.init.zeros_(layer.weight)

    def share_embedders(self, backbone: LatteTransformer3DModel) -> None:
        """Do nothing: Latte has one embedder."""

    def run(self, backbone: LatteTransformer3DModel, inputs: Inputs) -> Tensor:
        sample: Tensor = backbone(**inputs).sample  # (B, C_out, F, H, W)
        return sample

    def blocks(self, backbone: LatteTransformer3DModel) -> list[nn.Module]:
        pairs = zip(backbone.transformer_blocks, backbone.temporal_transformer_blocks, strict=True)
        return list(chain.from_iterable(pairs))

    def attach(self, block: BasicTransformerBlock, gates: BlockGates) -> None:
        attach_gates(block, gates, mlp_norm=block.norm2)  # with adaLN-single there is no norm before attn2

    def lora_targets(self, block: BasicTransformerBlock) -> tuple[str, ...]:
        return LORA_TARGETS

    def timestep_embedding(self, backbone: LatteTransformer3DModel, timestep: Tensor) -> Tensor:
        embedder = backbone.adaln_single.emb
        sinusoid = embedder.time_proj(timestep)  # (B, 256)
        dtype = embedder.timestep_embedder.linear_1.weight.dtype
        embedding: Tensor = embedder.timestep_embedder(sinusoid.to(dtype))  # (B, C)
        return embedding

    def permute_units(self, backbone: LatteTransformer3DModel, block: int, heads: Tensor, groups: Tensor) -> None:
        permute_block(self.blocks(backbone)[block], heads, groups)


ADAPTER = LatteAdapter()
