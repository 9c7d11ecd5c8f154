"""Files of the published DiT, SiT and DyDiT code: their names, and what they say of a model's structure.

Three things make such a file more than other names: query, key and value are one tensor; the embedders, which
diffusers repeats in every block, are stored once; and its function is that of the published code, which spaces the
timestep's frequencies by 128 where diffusers has 127, and keeps the position table among the weights (averaged ones
drift from the computed table by some 1e-4).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import isqrt
from typing import Any

from torch import Tensor

from dyexport.backbones.base import Preset
from dyexport.backbones.dialect import Dialect, Part
from dyexport.backbones.dit.preset import FREQ_SHIFT, PRESETS, STORED_POSITIONS, DiTPreset

TRUNK = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
EMBEDDERS = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
BLOCK = {
    "adaLN_modulation.1": ("norm1.linear",),
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
ROUTERS = {
    "attn_rate.router": "heads",
    "mlp_rate.router": "groups",
    "token_selection.mlp_head.0": "tokens.inner",
    "token_selection.mlp_head.2": "tokens.outer",
}


class PublishedDiT(Dialect):
    """State dict of the published code: ``blocks.N...``, ``x_embedder``, and DyDiT's routers."""

    description = "the published DiT and SiT code"
    numerics: Mapping[str, Any] = {FREQ_SHIFT: 0, STORED_POSITIONS: True}

    def matches(self, names: Collection[str]) -> bool:
        return "x_embedder.proj.weight" in names

    def structure(self, weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Read sizes off shapes; the number of heads, which shapes do not tell, is that of a known model as wide."""
        patches, final = weights["x_embedder.proj.weight"], weights["final_layer.linear.weight"]
        width, channels, patch, _ = patches.shape
        heads = {preset.hidden_size: preset.heads for preset in PRESETS}.get(width)
        if heads is None or "pos_embed" not in weights or "y_embedder.embedding_table.weight" not in weights:
            return None
        return {
            "_class_name": DiTPreset.stock,
            "num_attention_heads": heads,
            "attention_head_dim": width // heads,
            "in_channels": channels,
            "out_channels": final.shape[0] // patch**2,
            "num_layers": len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
            "sample_size": isqrt(weights["pos_embed"].shape[-2]) * patch,
            "patch_size": patch,
            "num_embeds_ada_norm": len(weights["y_embedder.embedding_table.weight"]) - 1,
            "norm_eps": 1e-6,
        }

    def places(self, target: Collection[str], preset: Preset) -> dict[str, tuple[Part, ...]]:
        homes: dict[str, Part] = {"pos_embed.pos_embed": Part("pos_embed")}
        for kind in ("weight", "bias"):
            homes |= {f"{stock}.{kind}": Part(f"{layer}.{kind}") for layer, stock in TRUNK.items()}
            for block in range(preset.depth):
                homes |= _block(block, kind)
        return {name: (home,) for name, home in homes.items() if name in target}


def _block(block: int, kind: str) -> dict[str, Part]:
    stock, layers = f"transformer_blocks.{block}", f"blocks.{block}"
    homes = {f"{stock}.{name}.{kind}": Part(f"{layer}.{kind}") for layer, name in EMBEDDERS.items()}
    homes |= {f"routers.{block}.{name}.{kind}": Part(f"{layers}.{layer}.{kind}") for layer, name in ROUTERS.items()}
    for layer, parts in BLOCK.items():
        for index, name in enumerate(parts):
            homes[f"{stock}.{name}.{kind}"] = Part(f"{layers}.{layer}.{kind}", index, index + 1, len(parts))
    return homes


DIALECTS: tuple[Dialect, ...] = (PublishedDiT(),)
LORA_LOADER: str | None = None
"""Class of diffusers that translates names of LoRA layers."""
