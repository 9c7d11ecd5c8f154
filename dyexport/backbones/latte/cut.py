"""Recipes of the slim Latte."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dyexport.backbones.base import channels_of
from dyexport.backbones.dit.cut import block_recipes
from dyexport.backbones.latte.slim import SlimLatte
from dyexport.backbones.latte.slim_conditioning import LatteConditioning, LatteLayout, depth_of
from dyexport.bundle.plan import Segment
from dyexport.bundle.spec import ModelSpec
from dyexport.bundle.tensors import TensorSpec
from dyexport.slicing.cut_lora import router_names
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

SPATIAL = "pos_embed.frequencies"
TEMPORAL = "temp_pos_embed.frequencies"
FREQUENCIES = "time_proj.frequencies"
EMBEDDER = "adaln_single.emb.timestep_embedder"
THETA = 10000


def slice_network(context: SliceContext, segment: Segment) -> Slice:
    """Cut the network of a segment."""
    config, td_lora = context.spec.config, context.spec.td_lora
    group_size = 4 * channels_of(config) // context.groups
    module = on_meta(context, SlimLatte, config, segment, group_size=group_size, td_lora=td_lora)
    sources = {
        "positions.spatial": SPATIAL,
        "positions.temporal": TEMPORAL,
        **linear_names("patch", "pos_embed.proj"),
        **linear_names("caption.inner", "caption_projection.linear_1"),
        **linear_names("caption.outer", "caption_projection.linear_2"),
        **linear_names("final", "proj_out"),
    }
    recipes = copies(module, sources)
    weights = module.state_dict()
    for index in range(segment.depth):
        recipes |= _block(context, segment, index, weights)
    assert recipes.keys() == weights.keys()
    return Slice(
        module=module,
        recipes=recipes,
        inputs=(*_inputs(context.spec), *routed_inputs(segment)),
        outputs=outputs_of(segment),
        limits=routed_limits(segment),
    )


def _inputs(spec: ModelSpec) -> tuple[TensorSpec, ...]:
    """Describe the inputs. Frames are whole patches; samples share the modulation, a function of t alone."""
    config, patch = spec.config, spec.config["patch_size"]
    shapes: dict[str, tuple[int | str, ...]] = {
        "hidden_states": ("batch", config["in_channels"], "frames", f"{patch}*height", f"{patch}*width"),
        "encoder_hidden_states": ("batch", "text_tokens", config["caption_channels"]),
        "modulation": (1, LatteLayout.of(config, spec.td_lora).size),
    }
    return tuple(TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in shapes.items())


def slice_conditioning(context: SliceContext) -> Slice:
    """Cut the conditioning network."""
    config, td_lora = context.spec.config, context.spec.td_lora
    module = on_meta(context, LatteConditioning, config, td_lora=td_lora)
    sources = {
        "frequencies": FREQUENCIES,
        "table": "scale_shift_table",
        **linear_names("time_in", f"{EMBEDDER}.linear_1"),
        **linear_names("time_out", f"{EMBEDDER}.linear_2"),
        **linear_names("blocks", "adaln_single.linear"),
        **(router_names("experts", depth_of(config)) if td_lora else {}),
    }
    inputs = (TensorSpec(name="timestep", dtype="float32", shape=("rows",)),)
    return Slice(module=module, recipes=copies(module, sources), inputs=inputs, outputs=("modulation",))


def tables(config: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Compute the frequencies of positions and of the timestep embedding."""
    channels = channels_of(config)
    return {
        SPATIAL: _positions(channels // 4),
        TEMPORAL: _positions(channels // 2),
        FREQUENCIES: sinusoid_frequencies(),
    }


def _positions(count: int) -> Tensor:
    """Compute the frequencies of diffusers' ``get_1d_sincos_pos_embed_from_grid``: (count,)."""
    return (1 / THETA ** (torch.arange(count, dtype=torch.float64) / count)).float()


def _block(context: SliceContext, segment: Segment, index: int, weights: Mapping[str, Tensor]) -> dict[str, Recipe]:
    """Return the recipes of a block. Spatial blocks have even indices, temporal ones odd."""
    pair, temporal = divmod(index, 2)
    stock, slim = f"{'temporal_' if temporal else ''}transformer_blocks.{pair}", f"blocks.{index}"
    recipes = block_recipes(context, segment, index, weights, stock=stock)
    table = f"{slim}.table"
    recipes[table] = recipe_for(weights[table], "copy", (f"{stock}.scale_shift_table",))
    if not temporal:
        recipes |= _to_text(context.spec.config, f"{slim}.to_text", f"{stock}.attn2", weights)
    return recipes


def _to_text(config: Mapping[str, Any], slim: str, stock: str, weights: Mapping[str, Tensor]) -> dict[str, Recipe]:
    """Return the recipes of attention to the text, at full width."""
    linears = {"key": "to_k", "value": "to_v", "out": "to_out.0"}
    sources: dict[str, str] = {}
    for layer, dense in linears.items():
        sources |= linear_names(f"{slim}.{layer}", f"{stock}.{dense}")
    recipes = {name: recipe_for(weights[name], "copy", (source,)) for name, source in sources.items()}
    heads, size = tuple(range(config["num_attention_heads"])), config["attention_head_dim"]
    for name, source in linear_names(f"{slim}.query", f"{stock}.to_q").items():
        recipes[name] = recipe_for(weights[name], "rows", (source,), units=heads, unit_size=size, scale=size**-0.5)
    return recipes
