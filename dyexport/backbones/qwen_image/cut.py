"""Qwen-Image: where the weights of the slim networks come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dyexport.backbones.base import channels_of
from dyexport.backbones.qwen_image.slim import SlimQwenImage
from dyexport.backbones.qwen_image.slim_conditioning import QwenImageConditioning, QwenImageLayout
from dyexport.bundle.plan import Segment
from dyexport.bundle.spec import ModelSpec
from dyexport.bundle.tensors import TensorSpec
from dyexport.slicing.cut_lora import PathCut, router_names
from dyexport.slicing.modulation import sinusoid_frequencies
from dyexport.slicing.recipes import Recipe
from dyexport.slicing.slicer import (
    Slice,
    SliceContext,
    copies,
    linear_names,
    on_meta,
    outputs_of,
    recipe_for,
    routed_inputs,
    routed_limits,
)
from dyexport.slicing.slim_lora import lora_paths

ROTARY = "pos_embed.frequencies"
FREQUENCIES = "time_proj.frequencies"
EMBEDDER = "time_text_embed.timestep_embedder"
THETA = 10000
STREAMS = {
    "image": ("to_q", "to_k", "to_v", "norm_q", "norm_k", "to_out.0", "img_mlp"),
    "text": ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k", "to_add_out", "txt_mlp"),
}
"""Layers of the stock block, by stream: query, key, value, their norms, the output projection, the MLP."""


def slice_network(context: SliceContext, segment: Segment) -> Slice:
    config, td_lora = context.spec.config, context.spec.td_lora
    group_size = 4 * channels_of(config) // context.groups
    module = on_meta(context, SlimQwenImage, config, segment, group_size=group_size, td_lora=td_lora)
    sources = {
        "rotary": ROTARY,
        "text_norm": "txt_norm.weight",
        **linear_names("image_in", "img_in"),
        **linear_names("text_in", "txt_in"),
        **linear_names("final", "proj_out"),
    }
    weights = module.state_dict()
    recipes = copies(module, sources)
    for index in range(segment.depth):
        recipes |= _Cut(segment, index, weights, head_dim=config["attention_head_dim"], group_size=group_size).all()
        if (paths := lora_paths(td_lora, segment)) is not None:
            recipes |= _paths(PathCut(paths, index, weights), segment, config["attention_head_dim"], group_size)
    assert recipes.keys() == weights.keys()
    return Slice(
        module=module,
        recipes=recipes,
        inputs=(*_inputs(context.spec), *routed_inputs(segment)),
        outputs=outputs_of(segment),
        limits=routed_limits(segment),
        floors={"image_tokens": segment.largest_capacity} if segment.limited_blocks else {},
    )


def _inputs(spec: ModelSpec) -> tuple[TensorSpec, ...]:
    """Return the inputs of a segment's network. Samples share the modulation, which depends on sigma alone."""
    config = spec.config
    shapes: dict[str, tuple[int | str, ...]] = {
        "hidden_states": ("batch", "image_tokens", config["in_channels"]),
        "encoder_hidden_states": ("batch", "text_tokens", config["joint_attention_dim"]),
        "encoder_hidden_states_mask": ("batch", "text_tokens"),
        "modulation": (1, QwenImageLayout.of(config, spec.td_lora).size),
    }
    floats = (TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in shapes.items())
    return (*floats, TensorSpec(name="img_shapes", dtype="int64", shape=(3,)))


def slice_conditioning(context: SliceContext) -> Slice:
    config, td_lora = context.spec.config, context.spec.td_lora
    module = on_meta(context, QwenImageConditioning, config, td_lora=td_lora)
    sources = {
        "frequencies": FREQUENCIES,
        **linear_names("time_in", f"{EMBEDDER}.linear_1"),
        **linear_names("time_out", f"{EMBEDDER}.linear_2"),
        **linear_names("final", "norm_out.linear"),
        **(router_names("experts", config["num_layers"]) if td_lora else {}),
    }
    for index in range(config["num_layers"]):
        for slim, stock in (("image", "img_mod"), ("text", "txt_mod")):
            sources |= linear_names(f"{slim}.{index}", f"transformer_blocks.{index}.{stock}.1")
    inputs = (TensorSpec(name="timestep", dtype="float32", shape=("rows",)),)
    return Slice(module=module, recipes=copies(module, sources), inputs=inputs, outputs=("modulation",))


def tables(config: Mapping[str, Any]) -> Mapping[str, Tensor]:
    return {ROTARY: _rotary(config), FREQUENCIES: sinusoid_frequencies()}


def _rotary(config: Mapping[str, Any]) -> Tensor:
    """Return the frequencies of diffusers' ``QwenEmbedRope``, axis after axis, to the same bits: (D / 2,)."""
    axes = [torch.arange(0, size, 2).to(torch.float32).div(size) for size in config["axes_dims_rope"]]
    return torch.cat([1.0 / torch.pow(THETA, exponent) for exponent in axes])


class _Cut:
    """Recipes of one block."""

    def __init__(
        self, segment: Segment, index: int, weights: Mapping[str, Tensor], *, head_dim: int, group_size: int
    ) -> None:
        self.index, self.weights, self.head_dim = index, weights, head_dim
        self.routed, self.last = segment.token_paths[index] != "all", index == segment.depth - 1
        self.of_heads: dict[str, Any] = {"units": segment.heads[index], "unit_size": head_dim}
        self.of_groups: dict[str, Any] = {"units": segment.groups[index], "unit_size": group_size}
        self.recipes: dict[str, Recipe] = {}

    def all(self) -> dict[str, Recipe]:
        for stream in STREAMS:
            self.stream(stream, f"transformer_blocks.{self.index}")
        if self.routed:
            for slim, layer in (("router_in", "inner"), ("router_out", "outer")):
                for name, source in linear_names(slim, f"routers.{self.index}.tokens.{layer}").items():
                    self.add(name, "copy", source)
        return self.recipes

    def stream(self, slim: str, stock: str) -> None:
        *qkv, query_norm, key_norm, out, mlp = STREAMS[slim]
        for kind in ("weight", "bias"):
            sources = [f"{stock}.attn.{name}.{kind}" for name in qkv]
            self.add(f"{slim}.qkv.{kind}", "qkv", *sources, **self.of_heads, halves=True)
        scale = self.head_dim**-0.5
        self.add(f"{slim}.query_norm", "norm", f"{stock}.attn.{query_norm}.weight", scale=scale, halves=True)
        self.add(f"{slim}.key_norm", "norm", f"{stock}.attn.{key_norm}.weight", halves=True)
        if slim == "text" and self.last:
            return
        self.columns(f"{slim}_out", f"{stock}.attn.{out}", self.of_heads)
        for kind in ("weight", "bias"):
            self.add(f"{slim}_mlp.fc1.{kind}", "rows", f"{stock}.{mlp}.net.0.proj.{kind}", **self.of_groups)
        self.columns(f"{slim}_mlp.fc2", f"{stock}.{mlp}.net.2", self.of_groups)

    def columns(self, slim: str, stock: str, units: Mapping[str, Any]) -> None:
        self.add(f"{slim}.weight", "columns", f"{stock}.weight", **units)
        self.add(f"{slim}.bias", "copy", f"{stock}.bias")

    def add(self, name: str, kind: str, *sources: str, **settings: Any) -> None:
        name = f"blocks.{self.index}.{name}"
        self.recipes[name] = recipe_for(self.weights[name], kind, sources, **settings)


def _paths(cut: PathCut, segment: Segment, head_dim: int, group_size: int) -> dict[str, Recipe]:
    """Return the low-rank paths of one block. The query's norm applies the attention scale, so its path does not."""
    heads: dict[str, Any] = {"units": segment.heads[cut.index], "unit_size": head_dim}
    groups: dict[str, Any] = {"units": segment.groups[cut.index], "unit_size": group_size}
    for slim, (query, key, value, _, _, out, mlp) in STREAMS.items():
        cut.narrow_out(f"{slim}.qkv.low_rank.query", f"attn.{query}", **heads, halves=True)
        cut.narrow_out(f"{slim}.qkv.low_rank.key", f"attn.{key}", **heads, halves=True)
        cut.narrow_out(f"{slim}.qkv.low_rank.value", f"attn.{value}", **heads)
        if slim == "text" and cut.index == segment.depth - 1:
            continue
        cut.narrow_in(f"{slim}_out.low_rank", f"attn.{out}", **heads)
        cut.narrow_out(f"{slim}_mlp.fc1.low_rank", f"{mlp}.net.0.proj", **groups)
        cut.narrow_in(f"{slim}_mlp.fc2.low_rank", f"{mlp}.net.2", **groups)
    return cut.recipes
