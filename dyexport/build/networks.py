"""The networks that a plan exports, what identifies them, and what a plan costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from dyexport.bundle import ModelSpec, Segment, SegmentPlan
from dyexport.calibration.segments import PlanSettings, make_segments, price_plan
from dyexport.slicing.flops import FlopsModel
from dyexport.slicing.recipes import Read, Recipe, lay_out
from dyexport.slicing.slicer import Slice, UnitOrder, dense_reader, dense_segment, slice_segment
from dyexport.tables import TokenStats, WidthTable

DENSE = -1
STATIC_PREFIX = "static."  # before names of the static model's weights, where they are not the dynamic one's


@dataclass(frozen=True, kw_only=True)
class Network:
    """One graph to export: a segment of the plan, or the dense baseline (index -1)."""

    index: int
    segment: Segment
    slice: Slice

    @property
    def name(self) -> str:
        return "dense" if self.index == DENSE else f"segment-{self.index:02d}"


def cut_networks(
    spec: ModelSpec, widths: WidthTable, segments: Sequence[Segment], *, baseline: bool, dense_prefix: str
) -> list[Network]:
    """One per segment and, with ``baseline``, the dense one, whose weights are called ``dense_prefix`` + name."""
    groups = widths.groups.shape[-1]
    networks = [
        Network(index=index, segment=segment, slice=slice_segment(spec, segment, groups=groups))
        for index, segment in enumerate(segments)
    ]
    if baseline:
        segment = dense_segment(spec, UnitOrder.of(widths))
        piece = slice_segment(spec, segment, groups=groups)
        networks.append(Network(index=DENSE, segment=segment, slice=_renamed(piece, dense_prefix)))
    return networks


def _renamed(piece: Slice, prefix: str) -> Slice:
    """The same network with weights read from sources of other names."""
    recipes = {
        name: replace(recipe, sources=tuple(f"{prefix}{source}" for source in recipe.sources))
        for name, recipe in piece.recipes.items()
    }
    return replace(piece, recipes=recipes)


def store_reader(config: Mapping[str, Any], weights: Mapping[str, Tensor], static: Mapping[str, Tensor]) -> Read:
    """Reads the dynamic model's weights and, under names with ``STATIC_PREFIX``, the static model's."""
    mine, theirs = dense_reader(weights, config), dense_reader(static, config)
    return lambda name: theirs(name[len(STATIC_PREFIX) :]) if name.startswith(STATIC_PREFIX) else mine(name)


def identity(recipe: Recipe) -> list[Any]:
    """A recipe as a JSON value."""
    return [recipe.kind, recipe.sources, recipe.shape, str(recipe.dtype), recipe.units, recipe.unit_size]


def plan_for(spec: ModelSpec, widths: WidthTable, stats: TokenStats | None, settings: PlanSettings) -> SegmentPlan:
    """Segments for K engines, with FLOPs and bytes; ``resident_bytes`` counts a copy of its weights for each engine."""
    flops = FlopsModel.of_dit(spec.config)
    segments = make_segments(widths, stats, flops, settings)
    slices = [slice_segment(spec, segment, groups=widths.groups.shape[-1]) for segment in segments]
    layout = lay_out(recipe for piece in slices for recipe in piece.recipes.values())
    resident = sum(piece.nbytes for piece in slices)
    return price_plan(segments, widths, stats, flops, disk_bytes=layout.nbytes, resident_bytes=resident)
