"""Recipes of the slim DiT and SiT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.models.embeddings import PatchEmbed
from torch import Tensor

from dyexport.backbones.base import channels_of
from dyexport.backbones.dit.preset import FREQ_SHIFT
from dyexport.backbones.dit.slim import SlimDiT
from dyexport.backbones.dit.slim_conditioning import DiTConditioning, DiTLayout
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

POSITION = "pos_embed.pos_embed"
FREQUENCIES = "time_proj.frequencies"
EMBEDDER = "transformer_blocks.0.norm1.emb"
TOKEN_ROUTER = "routers.{block}.tokens.{layer}.{kind}"


def slice_network(context: SliceContext, segment: Segment) -> Slice:
    """Cut the network of a segment."""
    spec, config = context.spec, context.spec.config
    group_size = 4 * channels_of(config) // context.groups
    module = on_meta(context, SlimDiT, config, segment, group_size=group_size, td_lora=spec.td_lora)
    sources = {"position": POSITION, **linear_names("patch", "pos_embed.proj"), **linear_names("final", "proj_out_2")}
    weights = module.state_dict()
    recipes = copies(module, sources)
    for index in range(segment.depth):
        recipes |= block_recipes(context, segment, index, weights, stock=f"transformer_blocks.{index}")
    assert recipes.keys() == weights.keys()
    inputs = (
        TensorSpec(name="hidden_states", dtype="float32", shape=("batch", *spec.latent_shape)),
        TensorSpec(name="modulation", dtype="float32", shape=("batch", DiTLayout.of(config, spec.td_lora).size)),
        *routed_inputs(segment),
    )
    return Slice(
        module=module, recipes=recipes, inputs=inputs, outputs=outputs_of(segment), limits=routed_limits(segment)
    )


def slice_conditioning(context: SliceContext) -> Slice:
    """Cut the conditioning network."""
    config = context.spec.config
    td_lora = context.spec.td_lora
    module = on_meta(context, DiTConditioning, config, td_lora=td_lora)
    sources = {
        "frequencies": FREQUENCIES,
        "labels.weight": f"{EMBEDDER}.class_embedder.embedding_table.weight",
        **linear_names("time_in", f"{EMBEDDER}.timestep_embedder.linear_1"),
        **linear_names("time_out", f"{EMBEDDER}.timestep_embedder.linear_2"),
        **linear_names("final", "proj_out_1"),
    }
    for index in range(config["num_layers"]):
        sources |= linear_names(f"blocks.{index}", f"transformer_blocks.{index}.norm1.linear")
    if td_lora is not None:
        sources |= router_names("experts", config["num_layers"])
    inputs = (
        TensorSpec(name="timestep", dtype="float32", shape=("rows",)),
        TensorSpec(name="class_labels", dtype="int64", shape=("rows",)),
    )
    return Slice(module=module, recipes=copies(module, sources), inputs=inputs, outputs=("modulation",))


def tables(config: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Compute the position table and the frequencies of the timestep embedding."""
    return {POSITION: _position_table(config), FREQUENCIES: sinusoid_frequencies(config.get(FREQ_SHIFT, 1))}


def _position_table(config: Mapping[str, Any]) -> Tensor:
    size = config["sample_size"]
    embed = PatchEmbed(
        height=size, width=size, patch_size=config["patch_size"], in_channels=1, embed_dim=channels_of(config)
    )
    table: Tensor = embed.pos_embed  # (1, N, C)
    return table


def block_recipes(
    context: SliceContext, segment: Segment, index: int, weights: Mapping[str, Tensor], *, stock: str
) -> dict[str, Recipe]:
    """Return the recipes of a ``SlimBlock``, cut from the ``BasicTransformerBlock`` named ``stock``."""
    config, td_lora = context.spec.config, context.spec.td_lora
    head_dim, group_size = config["attention_head_dim"], 4 * channels_of(config) // context.groups
    recipes = _linears(segment, index, weights, stock, head_dim, group_size)
    if (spec := lora_paths(td_lora, segment)) is not None:
        recipes |= _paths(PathCut(spec, index, weights), segment, head_dim, group_size)
    return recipes


def _linears(
    segment: Segment, index: int, weights: Mapping[str, Tensor], stock: str, head_dim: int, group_size: int
) -> dict[str, Recipe]:
    slim = f"blocks.{index}"
    heads, kept = segment.heads[index], segment.groups[index]
    recipes: dict[str, Recipe] = {}

    def add(name: str, kind: str, *sources: str, **settings: Any) -> None:
        name = f"{slim}.{name}"
        recipes[name] = recipe_for(weights[name], kind, sources, **settings)

    of_heads, of_groups = {"units": heads, "unit_size": head_dim}, {"units": kept, "unit_size": group_size}
    for kind in ("weight", "bias"):
        qkv = [f"{stock}.attn1.to_{part}.{kind}" for part in "qkv"]
        add(f"qkv.{kind}", "qkv", *qkv, **of_heads, scale=head_dim**-0.5)
        add(f"fc1.{kind}", "rows", f"{stock}.ff.net.0.proj.{kind}", **of_groups)
        if segment.token_paths[index] != "all":
            for layer, name in (("inner", "router_in"), ("outer", "router_out")):
                add(f"{name}.{kind}", "copy", TOKEN_ROUTER.format(block=index, layer=layer, kind=kind))
    add("out.weight", "columns", f"{stock}.attn1.to_out.0.weight", **of_heads)
    add("out.bias", "copy", f"{stock}.attn1.to_out.0.bias")
    add("fc2.weight", "columns", f"{stock}.ff.net.2.weight", **of_groups)
    add("fc2.bias", "copy", f"{stock}.ff.net.2.bias")
    return recipes


def _paths(cut: PathCut, segment: Segment, head_dim: int, group_size: int) -> dict[str, Recipe]:
    heads: dict[str, Any] = {"units": segment.heads[cut.index], "unit_size": head_dim}
    groups: dict[str, Any] = {"units": segment.groups[cut.index], "unit_size": group_size}
    cut.narrow_out("qkv.low_rank.query", "attn1.to_q", **heads, scale=head_dim**-0.5)
    cut.narrow_out("qkv.low_rank.key", "attn1.to_k", **heads)
    cut.narrow_out("qkv.low_rank.value", "attn1.to_v", **heads)
    cut.narrow_in("out.low_rank", "attn1.to_out.0", **heads)
    cut.narrow_out("fc1.low_rank", "ff.net.0.proj", **groups)
    cut.narrow_in("fc2.low_rank", "ff.net.2", **groups)
    return cut.recipes
