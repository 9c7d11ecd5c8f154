"""Files of the published DiT, SiT, DyDiT and DyFLUX code: their names, and those of the dynamic model.

A DyFLUX file has diffusers' own names, token routers inside the blocks, and no width routers. Any other is a
state dict of ``blocks.N...``, and three things make it more than other names: query, key and value are one tensor;
the embedders, which diffusers repeats in every block, are stored once; and its function is that of the published
code, which spaces the timestep's frequencies by 128 where diffusers has 127, and keeps the position table among the
weights (averaged ones drift from the computed table by some 1e-4).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from dyexport.backbones.dit.preset import FREQ_SHIFT, STORED_POSITIONS

CONFIG: Mapping[str, Any] = {FREQ_SHIFT: 0, STORED_POSITIONS: True}

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
POSITIONS = {"pos_embed": ("pos_embed.pos_embed",)}
ROUTER = re.compile(r"routers\.(?P<block>\d+)\.(?P<kind>heads|groups|tokens)\.(?P<layer>.+)")


def is_published(names: Collection[str]) -> bool:
    """Whether tensors are named as in the published code."""
    return "x_embedder.proj.weight" in names


def has_routers(names: Collection[str]) -> bool:
    """Whether a file has the routers of DyDiT or DyFLUX."""
    return any(".attn_rate." in name or ".mlp_rate." in name or ".token_selection." in name for name in names)


def correspondence(target: Collection[str], depth: int) -> dict[str, tuple[str, ...]]:
    """Published name -> names in ``target``: the thirds of a qkv tensor, and of any other its copies."""
    layers: dict[str, tuple[str, ...]] = {layer: (stock,) for layer, stock in TRUNK.items()}
    for layer, stock in EMBEDDERS.items():
        layers[layer] = tuple(f"transformer_blocks.{block}.{stock}" for block in range(depth))
    for block in range(depth):
        for layer, parts in BLOCK.items():
            layers[f"blocks.{block}.{layer}"] = tuple(f"transformer_blocks.{block}.{part}" for part in parts)
        for layer, router in ROUTERS.items():
            layers[f"blocks.{block}.{layer}"] = (f"routers.{block}.{router}",)
    names = {
        f"{layer}.{kind}": tuple(f"{part}.{kind}" for part in parts)
        for layer, parts in layers.items()
        for kind in ("weight", "bias")
    }
    return POSITIONS | {name: parts for name, parts in names.items() if parts[0] in target}


def expected(target: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """What a published file must hold to become ``target``: names and shapes, without values."""
    return {
        name: torch.cat([target[part] for part in parts]) if _is_fused(name) else target[parts[0]]
        for name, parts in correspondence(target, depth).items()
    }


def translate(weights: Mapping[str, Tensor], target: Collection[str], depth: int) -> dict[str, Tensor]:
    """The tensors of a published file under the names of ``target``, sharing its memory."""
    translated: dict[str, Tensor] = {}
    for name, parts in correspondence(target, depth).items():
        tensors = weights[name].chunk(len(parts)) if _is_fused(name) else [weights[name]] * len(parts)
        translated |= zip(parts, tensors, strict=True)
    return translated


def dyflux_correspondence(target: Mapping[str, Tensor], double_blocks: int) -> dict[str, tuple[str, Tensor]]:
    """DyFLUX's name -> name and tensor in ``target``, which numbers double and single blocks through."""
    names: dict[str, tuple[str, Tensor]] = {}
    for name, tensor in target.items():
        if not (router := ROUTER.fullmatch(name)):
            names[name] = name, tensor
        elif router["kind"] == "tokens":
            block = int(router["block"])
            single = block >= double_blocks
            home = f"single_transformer_blocks.{block - double_blocks}" if single else f"transformer_blocks.{block}"
            names[f"{home}.token_selection.{router['layer']}"] = name, tensor
    return names


def _is_fused(name: str) -> bool:
    return ".attn.qkv." in name
