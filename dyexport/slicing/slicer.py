"""Cutting a segment out of a dense model: a slim module on the meta device, and recipes for its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.models.embeddings import PatchEmbed
from torch import Tensor, nn

from dyexport.bundle import ModelSpec, Segment, TokenPath
from dyexport.errors import UsageError
from dyexport.models.dit import FREQ_SHIFT
from dyexport.presets import Preset
from dyexport.slicing.recipes import Read, Recipe, materialise
from dyexport.slicing.slim_dit import SlimDiT
from dyexport.tables import WidthTable

POSITION = "pos_embed.pos_embed"
FREQUENCIES = "time_proj.frequencies"
TOKEN_ROUTER = "routers.{block}.tokens.{layer}.{kind}"


@dataclass(frozen=True, kw_only=True)
class UnitOrder:
    """The order in which units stand in the weights, per block: dense indices, longest on first."""

    heads: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, widths: WidthTable) -> UnitOrder:
        """Units that are on longest first, so that the unions of segments tend to be prefixes."""
        return cls(heads=_longest_first(widths, widths.heads), groups=_longest_first(widths, widths.groups))


def _longest_first(widths: WidthTable, masks: np.ndarray) -> tuple[tuple[int, ...], ...]:
    time_on = np.tensordot(widths.measure(), masks, axes=1)  # (L, U)
    return tuple(tuple(int(unit) for unit in np.argsort(-row, kind="stable")) for row in time_on)


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A slim network without weights, and how to make each of them."""

    module: nn.Module
    recipes: Mapping[str, Recipe]

    @property
    def nbytes(self) -> int:
        return sum(recipe.nbytes for recipe in self.recipes.values())

    def load(self, read: Read) -> nn.Module:
        """The module with its weights, for running in torch."""
        module = self.module.to_empty(device="cpu")
        module.load_state_dict({name: materialise(recipe, read) for name, recipe in self.recipes.items()})
        return module.eval()


def spec_of(preset: Preset, config: Mapping[str, Any]) -> ModelSpec:
    """What a bundle says of a preset's model; ``config`` is the checkpoint's own."""
    return ModelSpec(
        name=preset.name,
        backbone=preset.backbone,
        objective=preset.objective,
        timestep_range=preset.timestep_range,
        tokens=preset.tokens,
        classes=preset.classes,
        pixel_space=preset.pixel_space,
        config=dict(config),
    )


def slice_segment(spec: ModelSpec, segment: Segment, *, groups: int) -> Slice:
    """The slim network of a segment; ``groups`` is G, the number of MLP groups of the dense model."""
    if spec.backbone not in _SLICERS:
        raise UsageError(f"no slim network for backbone {spec.backbone!r}; known: {', '.join(_SLICERS)}")
    return _SLICERS[spec.backbone](spec.config, segment, groups)


def dense_segment(spec: ModelSpec, order: UnitOrder) -> Segment:
    """The static model as a segment: every unit, every token, the whole range of t.

    ``order`` is that of the slim segments, so that those share the dense weights' bytes.
    """
    depth = len(order.heads)
    every_token: TokenPath = "all"
    return Segment(
        start=spec.timestep_range[0],
        end=spec.timestep_range[1],
        heads=order.heads,
        groups=order.groups,
        gated_heads=(False,) * depth,
        gated_groups=(False,) * depth,
        token_paths=(every_token,) * depth,
        capacities=(spec.tokens,) * depth,
    )


def dense_reader(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Read:
    """Reads a stock state dict (and ``routers.*``), plus the tables that few checkpoints store."""
    tables = {POSITION: _position_table(config), FREQUENCIES: _frequencies(config)}
    return lambda name: state[name] if name in state else tables[name]


def _position_table(config: Mapping[str, Any]) -> Tensor:
    size, channels = config["sample_size"], config["num_attention_heads"] * config["attention_head_dim"]
    embed = PatchEmbed(height=size, width=size, patch_size=config["patch_size"], in_channels=1, embed_dim=channels)
    table: Tensor = embed.pos_embed  # (1, N, C)
    return table


def _frequencies(config: Mapping[str, Any]) -> Tensor:
    """Frequencies of diffusers' ``get_timestep_embedding`` as DiT calls it, bit for bit: (128,)."""
    exponent = -math.log(10000) * torch.arange(0, 128, dtype=torch.float32)
    return torch.exp(exponent / (128 - config.get(FREQ_SHIFT, 1)))


def _slice_dit(config: Mapping[str, Any], segment: Segment, groups: int) -> Slice:
    channels = config["num_attention_heads"] * config["attention_head_dim"]
    with torch.device("meta"):
        module = SlimDiT(config, segment, group_size=4 * channels // groups)
    embedder = "transformer_blocks.0.norm1.emb"
    sources = {
        "position": POSITION,
        "frequencies": FREQUENCIES,
        "labels.weight": f"{embedder}.class_embedder.embedding_table.weight",
        **_linear("patch", "pos_embed.proj"),
        **_linear("time_in", f"{embedder}.timestep_embedder.linear_1"),
        **_linear("time_out", f"{embedder}.timestep_embedder.linear_2"),
        **_linear("final_modulation", "proj_out_1"),
        **_linear("final", "proj_out_2"),
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    recipes = {name: Recipe(kind="copy", sources=(source,), shape=shapes[name]) for name, source in sources.items()}
    for index in range(segment.depth):
        recipes |= _dit_block(index, segment, shapes, config["attention_head_dim"], 4 * channels // groups)
    assert recipes.keys() == shapes.keys()
    return Slice(module=module, recipes=recipes)


def _dit_block(
    index: int, segment: Segment, shapes: Mapping[str, tuple[int, ...]], head_dim: int, group_size: int
) -> dict[str, Recipe]:
    stock, slim = f"transformer_blocks.{index}", f"blocks.{index}"
    heads, groups = segment.heads[index], segment.groups[index]
    recipes: dict[str, Recipe] = {}

    def add(name: str, kind: Any, sources: tuple[str, ...], units: tuple[int, ...] = (), size: int = 1) -> None:
        shape = shapes[f"{slim}.{name}"]
        recipes[f"{slim}.{name}"] = Recipe(kind=kind, sources=sources, shape=shape, units=units, unit_size=size)

    for kind in ("weight", "bias"):
        add(f"modulation.{kind}", "copy", (f"{stock}.norm1.linear.{kind}",))
        add(f"qkv.{kind}", "qkv", tuple(f"{stock}.attn1.to_{part}.{kind}" for part in "qkv"), heads, head_dim)
        add(f"fc1.{kind}", "rows", (f"{stock}.ff.net.0.proj.{kind}",), groups, group_size)
        if segment.token_paths[index] != "all":
            for layer, name in (("inner", "router_in"), ("outer", "router_out")):
                add(f"{name}.{kind}", "copy", (TOKEN_ROUTER.format(block=index, layer=layer, kind=kind),))
    add("out.weight", "columns", (f"{stock}.attn1.to_out.0.weight",), heads, head_dim)
    add("out.bias", "copy", (f"{stock}.attn1.to_out.0.bias",))
    add("fc2.weight", "columns", (f"{stock}.ff.net.2.weight",), groups, group_size)
    add("fc2.bias", "copy", (f"{stock}.ff.net.2.bias",))
    return recipes


def _linear(slim: str, stock: str) -> dict[str, str]:
    return {f"{slim}.{kind}": f"{stock}.{kind}" for kind in ("weight", "bias")}


_SLICERS: dict[str, Callable[[Mapping[str, Any], Segment, int], Slice]] = {"dit": _slice_dit, "sit": _slice_dit}
