"""Files of FLUX.1 that have other names than diffusers': Black Forest Labs' own, and DyFLUX's."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from dyexport.backbones.base import Preset
from dyexport.backbones.dialect import Dialect, Part
from dyexport.backbones.flux.preset import FluxPreset

ROUTER = re.compile(r"routers\.(?P<block>\d+)\.(?P<kind>heads|groups|tokens)\.(?P<layer>.+)")
HEAD_DIM, ROPE_AXES = 128, (16, 56, 56)  # of every published FLUX.1
TRUNK = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "proj_out": "final_layer.linear",
    **{
        f"time_text_embed.{stock}.linear_{index}": f"{name}.{layer}"
        for stock, name in (
            ("timestep_embedder", "time_in"),
            ("text_embedder", "vector_in"),
            ("guidance_embedder", "guidance_in"),
        )
        for index, layer in ((1, "in_layer"), (2, "out_layer"))
    },
}
DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
DOUBLE_QKV = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
DOUBLE_NORMS = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}
SINGLE = {"norm.linear": "modulation.lin", "proj_out": "linear2"}
SINGLE_NORMS = {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}
SINGLE_FUSED = {"attn.to_q": (0, 1), "attn.to_k": (1, 2), "attn.to_v": (2, 3), "proj_mlp": (3, 7)}
"""Rows of ``linear1``, in units of the hidden size: query, key, value, and an MLP four times as wide."""


class BlackForestLabs(Dialect):
    """Single file of Black Forest Labs: ``double_blocks.N...``, ``single_blocks.N...``, ``img_in``."""

    description = "Black Forest Labs' FLUX.1 code"

    def matches(self, names: Collection[str]) -> bool:
        return "img_in.weight" in names and "double_blocks.0.img_attn.qkv.weight" in names

    def structure(self, weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Read sizes off shapes; None for heads of another size than those of FLUX.1, whose rotary axes are unknown."""
        width, channels = weights["img_in.weight"].shape
        if len(weights["double_blocks.0.img_attn.norm.query_norm.scale"]) != HEAD_DIM:
            return None
        return {
            "_class_name": FluxPreset.stock,
            "in_channels": channels,
            "out_channels": len(weights["final_layer.linear.weight"]),
            "num_layers": _blocks(weights, "double_blocks"),
            "num_single_layers": _blocks(weights, "single_blocks"),
            "attention_head_dim": HEAD_DIM,
            "num_attention_heads": width // HEAD_DIM,
            "joint_attention_dim": weights["txt_in.weight"].shape[1],
            "pooled_projection_dim": weights["vector_in.in_layer.weight"].shape[1],
            "guidance_embeds": "guidance_in.in_layer.weight" in weights,
            "axes_dims_rope": list(ROPE_AXES),
        }

    def places(self, target: Collection[str], preset: Preset) -> dict[str, tuple[Part, ...]]:
        assert isinstance(preset, FluxPreset)
        homes: dict[str, tuple[Part, ...]] = {}
        for kind in ("weight", "bias"):
            homes |= {f"{stock}.{kind}": (Part(f"{name}.{kind}"),) for stock, name in TRUNK.items()}
            scale_shift = f"final_layer.adaLN_modulation.1.{kind}"  # shift first there, scale first in diffusers
            homes[f"norm_out.linear.{kind}"] = (Part(scale_shift, 1, 2, 2), Part(scale_shift, 0, 1, 2))
            for block in range(preset.double_blocks):
                homes |= _double(f"transformer_blocks.{block}", f"double_blocks.{block}", kind)
            for block in range(preset.single_blocks):
                homes |= _single(f"single_transformer_blocks.{block}", f"single_blocks.{block}", kind)
        return {name: home for name, home in homes.items() if name in target}


def _blocks(weights: Collection[str], folder: str) -> int:
    return len({name.split(".")[1] for name in weights if name.startswith(f"{folder}.")})


def _double(stock: str, block: str, kind: str) -> dict[str, tuple[Part, ...]]:
    homes: dict[str, tuple[Part, ...]] = {}
    homes |= {f"{stock}.{name}.{kind}": (Part(f"{block}.{layer}.{kind}"),) for name, layer in DOUBLE.items()}
    homes |= {f"{stock}.{name}.weight": (Part(f"{block}.{layer}.scale"),) for name, layer in DOUBLE_NORMS.items()}
    for layer, parts in DOUBLE_QKV.items():
        for index, name in enumerate(parts):
            homes[f"{stock}.{name}.{kind}"] = (Part(f"{block}.{layer}.{kind}", index, index + 1, 3),)
    return homes


def _single(stock: str, block: str, kind: str) -> dict[str, tuple[Part, ...]]:
    homes: dict[str, tuple[Part, ...]] = {}
    homes |= {f"{stock}.{name}.{kind}": (Part(f"{block}.{layer}.{kind}"),) for name, layer in SINGLE.items()}
    homes |= {f"{stock}.{name}.weight": (Part(f"{block}.{layer}.scale"),) for name, layer in SINGLE_NORMS.items()}
    for name, (start, stop) in SINGLE_FUSED.items():
        homes[f"{stock}.{name}.{kind}"] = (Part(f"{block}.linear1.{kind}", start, stop, 7),)
    return homes


class DyFlux(Dialect):
    """File of the published DyFLUX code: diffusers' names, token routers inside the blocks, no width routers."""

    description = "the published DyFLUX code"

    def matches(self, names: Collection[str]) -> bool:
        routed = any(".token_selection.linear_t." in name for name in names)
        return routed and any(name.startswith("single_transformer_blocks.") for name in names)

    def structure(self, weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
        return None  # nor do diffusers' names without a configuration

    def places(self, target: Collection[str], preset: Preset) -> dict[str, tuple[Part, ...]]:
        assert isinstance(preset, FluxPreset)
        homes: dict[str, tuple[Part, ...]] = {}
        for name in target:
            if not (router := ROUTER.fullmatch(name)):
                homes[name] = (Part(name),)
            elif router["kind"] == "tokens":
                block = int(router["block"]) - preset.double_blocks
                home = f"single_transformer_blocks.{block}" if block >= 0 else f"transformer_blocks.{router['block']}"
                homes[name] = (Part(f"{home}.token_selection.{router['layer']}"),)
        return homes


DIALECTS: tuple[Dialect, ...] = (BlackForestLabs(), DyFlux())
LORA_LOADER: str | None = "FluxLoraLoaderMixin"
"""Class of diffusers that translates names of LoRA layers."""
