"""DiT and SiT: where the weights of the slim networks come from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.embeddings import PatchEmbed
from torch import Tensor

from dyexport.backbones.dit.preset import FREQ_SHIFT
from dyexport.backbones.dit.slim import DiTConditioning, SlimDiT, modulation_parts
from dyexport.bundle.manifest import ModelSpec, Segment
from dyexport.bundle.tensors import TensorSpec
from dyexport.slicing.cut_lora import PathCut, router_names
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
from dyexport.slicing.slim_lora import gates_size, lora_paths

POSITION = "pos_embed.pos_embed"
FREQUENCIES = "time_proj.frequencies"
EMBEDDER = "transformer_blocks.0.norm1.emb"
TOKEN_ROUTER = "routers.{block}.tokens.{layer}.{kind}"


def slice_network(architecture: SliceContext, segment: Segment) -> Slice:
    spec, config = architecture.spec, architecture.spec.config
    group_size = 4 * _channels(config) // architecture.groups
    module = on_meta(architecture, SlimDiT, config, segment, group_size=group_size, td_lora=spec.td_lora)
    sources = {"position": POSITION, **linear_names("patch", "pos_embed.proj"), **linear_names("final", "proj_out_2")}
    weights = module.state_dict()
    recipes = copies(module, sources)
    for index in range(segment.depth):
        recipes |= block_recipes(architecture, segment, index, weights, stock=f"transformer_blocks.{index}")
    assert recipes.keys() == weights.keys()
    inputs = (
        TensorSpec(name="hidden_states", dtype="float32", shape=("batch", *spec.latent_shape)),
        TensorSpec(name="modulation", dtype="float32", shape=("batch", _modulation_size(spec))),
        *routed_inputs(segment),
    )
    return Slice(
        module=module, recipes=recipes, inputs=inputs, outputs=outputs_of(segment), limits=routed_limits(segment)
    )


def slice_conditioning(architecture: SliceContext) -> Slice:
    config = architecture.spec.config
    td_lora = architecture.spec.td_lora
    module = on_meta(architecture, DiTConditioning, config, td_lora=td_lora)
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
    return {POSITION: _position_table(config), FREQUENCIES: _frequencies(config)}


def _channels(config: Mapping[str, Any]) -> int:
    channels: int = config["num_attention_heads"] * config["attention_head_dim"]
    return channels


def _modulation_size(spec: ModelSpec) -> int:
    depth = spec.config["num_layers"]
    return modulation_parts(depth) * _channels(spec.config) + gates_size(spec.td_lora, depth)


def _position_table(config: Mapping[str, Any]) -> Tensor:
    size = config["sample_size"]
    embed = PatchEmbed(
        height=size, width=size, patch_size=config["patch_size"], in_channels=1, embed_dim=_channels(config)
    )
    table: Tensor = embed.pos_embed  # (1, N, C)
    return table


def _frequencies(config: Mapping[str, Any]) -> Tensor:
    """Frequencies of diffusers' ``get_timestep_embedding`` as DiT calls it, bit for bit: (128,)."""
    exponent = -math.log(10000) * torch.arange(0, 128, dtype=torch.float32)
    return torch.exp(exponent / (128 - config.get(FREQ_SHIFT, 1)))


def block_recipes(
    architecture: SliceContext, segment: Segment, index: int, weights: Mapping[str, Tensor], *, stock: str
) -> dict[str, Recipe]:
    """A ``SlimBlock``'s weights; ``stock`` is the name of the ``BasicTransformerBlock`` it is cut from."""
    config, td_lora = architecture.spec.config, architecture.spec.td_lora
    head_dim, group_size = config["attention_head_dim"], 4 * _channels(config) // architecture.groups
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
    cut.narrow_out("low_rank.qkv.query", "attn1.to_q", **heads, scale=head_dim**-0.5)
    cut.narrow_out("low_rank.qkv.key", "attn1.to_k", **heads)
    cut.narrow_out("low_rank.qkv.value", "attn1.to_v", **heads)
    cut.narrow_in("low_rank.out", "attn1.to_out.0", **heads)
    cut.narrow_out("low_rank.fc1", "ff.net.0.proj", **groups)
    cut.narrow_in("low_rank.fc2", "ff.net.2", **groups)
    return cut.found
