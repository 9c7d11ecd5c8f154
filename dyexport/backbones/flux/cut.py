"""Recipes of the slim FLUX."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dyexport.backbones.base import channels_of
from dyexport.backbones.flux.slim import SlimFlux
from dyexport.backbones.flux.slim_conditioning import FluxConditioning, FluxLayout, depth_of
from dyexport.bundle.plan import Segment
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
THETA = 10000
MLP_RATIO = 4


def slice_network(context: SliceContext, segment: Segment) -> Slice:
    """Cut the network of a segment."""
    config = context.spec.config
    module = on_meta(
        context,
        SlimFlux,
        config,
        segment,
        group_size=_group_size(context),
        published_routers=_has_published_routers(context),
        td_lora=context.spec.td_lora,
        text_tokens=context.spec.text_tokens,
    )
    sources = {
        "rotary": ROTARY,
        **linear_names("image_in", "x_embedder"),
        **linear_names("text_in", "context_embedder"),
        **linear_names("final", "proj_out"),
    }
    weights = module.state_dict()
    recipes = copies(module, sources)
    for index in range(segment.depth):
        recipes |= _Cut(context, segment, index, weights).all()
        if (paths := lora_paths(context.spec.td_lora, segment)) is not None:
            recipes |= _paths(PathCut(paths, index, weights), segment, config, _group_size(context))
    assert recipes.keys() == weights.keys()
    return Slice(
        module=module,
        recipes=recipes,
        inputs=(*_inputs(context), *routed_inputs(segment)),
        outputs=outputs_of(segment),
        limits=routed_limits(segment),
        floors={"image_tokens": segment.largest_capacity} if segment.limited_blocks else {},
    )


def _inputs(context: SliceContext) -> tuple[TensorSpec, ...]:
    config, td_lora = context.spec.config, context.spec.td_lora
    size = FluxLayout.of(config, published_routers=_has_published_routers(context), td_lora=td_lora).size
    shapes: dict[str, tuple[int | str, ...]] = {
        "hidden_states": ("batch", "image_tokens", config["in_channels"]),
        "encoder_hidden_states": ("batch", "text_tokens", config["joint_attention_dim"]),
        "modulation": ("batch", size),
        "img_ids": ("image_tokens", 3),
        "txt_ids": ("text_tokens", 3),
    }
    return tuple(TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in shapes.items())


def slice_conditioning(context: SliceContext) -> Slice:
    """Cut the conditioning network."""
    config, td_lora = context.spec.config, context.spec.td_lora
    published = _has_published_routers(context)
    settings: dict[str, Any] = {"published_routers": published, "td_lora": td_lora}
    module = on_meta(context, FluxConditioning, config, **settings)
    embedder = "time_text_embed"
    sources = {
        "frequencies": FREQUENCIES,
        **linear_names("final", "norm_out.linear"),
        **linear_names("time_in", f"{embedder}.timestep_embedder.linear_1"),
        **linear_names("time_out", f"{embedder}.timestep_embedder.linear_2"),
    }
    embedders = {"pooled": "text_embedder"}
    if config["guidance_embeds"]:
        embedders["guidance"] = "guidance_embedder"
    for slim, stock in embedders.items():
        sources |= linear_names(f"{slim}.inner", f"{embedder}.{stock}.linear_1")
        sources |= linear_names(f"{slim}.outer", f"{embedder}.{stock}.linear_2")
    for index in range(config["num_layers"]):
        for stream, norm in enumerate(("norm1", "norm1_context")):
            sources |= linear_names(f"streams.{2 * index + stream}", f"transformer_blocks.{index}.{norm}.linear")
    for index in range(config["num_single_layers"]):
        sources |= linear_names(f"singles.{index}", f"single_transformer_blocks.{index}.norm.linear")
    if published:
        for index in range(depth_of(config)):
            sources |= dict(_router_names(index))
    if td_lora is not None:
        sources |= router_names("experts", depth_of(config))
    rows: dict[str, tuple[int | str, ...]] = {
        "timestep": ("rows",),
        "pooled_projections": ("rows", config["pooled_projection_dim"]),
    }
    if config["guidance_embeds"]:
        rows["guidance"] = ("rows",)
    inputs = tuple(TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in rows.items())
    return Slice(module=module, recipes=copies(module, sources), inputs=inputs, outputs=("modulation",))


def _has_published_routers(context: SliceContext) -> bool:
    """Return True if the conditioning network makes the weights of the token routers."""
    return context.token_routers and context.spec.token_router != "compact"


def _router_names(index: int) -> Iterator[tuple[str, str]]:
    slim, stock = f"routers.{index}", f"routers.{index}.tokens"
    yield from linear_names(f"{slim}.linear_t", f"{stock}.linear_t").items()
    yield from linear_names(f"{slim}.router", f"{stock}.router").items()
    yield f"{slim}.norm_weight", f"{stock}.norm.weight"
    yield f"{slim}.norm_bias", f"{stock}.norm.bias"


def tables(config: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Compute the frequencies of the rotary and of the timestep embedding."""
    return {ROTARY: _rotary(config), FREQUENCIES: sinusoid_frequencies()}


def _rotary(config: Mapping[str, Any]) -> Tensor:
    """Compute the angle per unit of position, theta ** (-2 j / d) on an axis of d channels: (D / 2,)."""
    axes = [torch.arange(0, size, 2, dtype=torch.float64) / size for size in config["axes_dims_rope"]]
    return torch.cat([THETA**-exponent for exponent in axes]).float()


def _group_size(context: SliceContext) -> int:
    return MLP_RATIO * channels_of(context.spec.config) // context.groups


class _Cut:
    """Recipes of one block."""

    def __init__(self, context: SliceContext, segment: Segment, index: int, weights: Mapping[str, Tensor]) -> None:
        config = context.spec.config
        self.doubles: int = config["num_layers"]
        self.channels, self.head_dim = channels_of(config), config["attention_head_dim"]
        self.group_size = _group_size(context)
        self.index, self.weights = index, weights
        self.heads, self.groups = segment.heads[index], segment.groups[index]
        self.recipes: dict[str, Recipe] = {}

    def all(self) -> dict[str, Recipe]:
        for layer in ("inner", "outer"):
            for name, source in linear_names(f"router.{layer}", f"routers.{self.index}.tokens.{layer}").items():
                if f"blocks.{self.index}.{name}" in self.weights:
                    self.add(name, "copy", source)
        if self.index < self.doubles:
            self.double(f"transformer_blocks.{self.index}")
        else:
            self.single(f"single_transformer_blocks.{self.index - self.doubles}")
        return self.recipes

    def add(self, name: str, kind: str, *sources: str, **settings: Any) -> None:
        name = f"blocks.{self.index}.{name}"
        self.recipes[name] = recipe_for(self.weights[name], kind, sources, **settings)

    def double(self, stock: str) -> None:
        attention = f"{stock}.attn"
        self.project("image", [f"{attention}.to_{part}" for part in "qkv"], f"{attention}.norm_{{}}")
        self.project("text", [f"{attention}.add_{part}_proj" for part in "qkv"], f"{attention}.norm_added_{{}}")
        self.columns("image_out", f"{attention}.to_out.0", self.heads, self.head_dim)
        self.columns("text_out", f"{attention}.to_add_out", self.heads, self.head_dim)
        for slim, feed in (("image_mlp", "ff"), ("text_mlp", "ff_context")):
            self.rows(f"{slim}.fc1", f"{stock}.{feed}.net.0.proj")
            self.columns(f"{slim}.fc2", f"{stock}.{feed}.net.2", self.groups, self.group_size)

    def single(self, stock: str) -> None:
        attention, out = f"{stock}.attn", f"{stock}.proj_out"
        self.project("projection", [f"{attention}.to_{part}" for part in "qkv"], f"{attention}.norm_{{}}")
        self.rows("fc1", f"{stock}.proj_mlp")
        of_heads, of_groups = (0, self.channels), (self.channels, (1 + MLP_RATIO) * self.channels)
        heads = {"units": self.heads, "unit_size": self.head_dim, "span": of_heads}
        self.add("out.weight", "columns", f"{out}.weight", **heads)
        groups = {"units": self.groups, "unit_size": self.group_size, "span": of_groups}
        self.add("fc2.weight", "columns", f"{out}.weight", **groups)
        self.add("fc2.bias", "copy", f"{out}.bias")

    def project(self, slim: str, qkv: list[str], norm: str) -> None:
        for kind in ("weight", "bias"):
            sources = [f"{name}.{kind}" for name in qkv]
            self.add(f"{slim}.qkv.{kind}", "qkv", *sources, units=self.heads, unit_size=self.head_dim, halves=True)
        scale = self.head_dim**-0.5
        self.add(f"{slim}.query_norm", "norm", f"{norm.format('q')}.weight", scale=scale, halves=True)
        self.add(f"{slim}.key_norm", "norm", f"{norm.format('k')}.weight", halves=True)

    def rows(self, slim: str, stock: str) -> None:
        for kind in ("weight", "bias"):
            self.add(f"{slim}.{kind}", "rows", f"{stock}.{kind}", units=self.groups, unit_size=self.group_size)

    def columns(self, slim: str, stock: str, units: tuple[int, ...], size: int) -> None:
        self.add(f"{slim}.weight", "columns", f"{stock}.weight", units=units, unit_size=size)
        self.add(f"{slim}.bias", "copy", f"{stock}.bias")


def _paths(cut: PathCut, segment: Segment, config: Mapping[str, Any], group_size: int) -> dict[str, Recipe]:
    """Return the recipes of one block's low-rank paths. Norms scale the query, so paths do not."""
    heads: dict[str, Any] = {"units": segment.heads[cut.index], "unit_size": config["attention_head_dim"]}
    groups: dict[str, Any] = {"units": segment.groups[cut.index], "unit_size": group_size}

    def project(slim: str, query: str, key: str, value: str) -> None:
        cut.narrow_out(f"{slim}.qkv.low_rank.query", query, **heads, halves=True)
        cut.narrow_out(f"{slim}.qkv.low_rank.key", key, **heads, halves=True)
        cut.narrow_out(f"{slim}.qkv.low_rank.value", value, **heads)

    if cut.index < config["num_layers"]:
        project("image", "attn.to_q", "attn.to_k", "attn.to_v")
        project("text", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
        cut.narrow_in("image_out.low_rank", "attn.to_out.0", **heads)
        cut.narrow_in("text_out.low_rank", "attn.to_add_out", **heads)
        for slim, feed in (("image_mlp", "ff"), ("text_mlp", "ff_context")):
            cut.narrow_out(f"{slim}.fc1.low_rank", f"{feed}.net.0.proj", **groups)
            cut.narrow_in(f"{slim}.fc2.low_rank", f"{feed}.net.2", **groups)
    else:
        channels = channels_of(config)
        project("projection", "attn.to_q", "attn.to_k", "attn.to_v")
        cut.narrow_out("fc1.low_rank", "proj_mlp", **groups)
        cut.narrow_in("out.low_rank", "proj_out", **heads, span=(0, channels))
        cut.narrow_in("fc2.low_rank", "proj_out", **groups, span=(channels, (1 + MLP_RATIO) * channels))
    return cut.recipes
