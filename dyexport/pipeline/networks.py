"""The networks of a plan, and the cost of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from torch import Tensor

from dyexport.bundle.manifest import CONDITIONING, DENSE, DENSE_CONDITIONING
from dyexport.bundle.plan import Segment, SegmentPlan, segment_name
from dyexport.bundle.spec import ModelSpec
from dyexport.bundle.tables import TokenStats, UnitOrder, WidthTable
from dyexport.calibration.segments import PlanSettings, make_segments, price_plan
from dyexport.flops import FlopsModel
from dyexport.models.hooks import BIAS
from dyexport.slicing.recipes import Read, Recipe
from dyexport.slicing.slicer import (
    Slice,
    SliceContext,
    dense_reader,
    dense_segment,
    slice_conditioning,
    slice_segment,
)
from dyexport.slicing.store_layout import lay_out

ROUTERS = "routers."  # prefix of routers among the weights of a dynamic model
STATIC_PREFIX = "static."  # prefix of the static model's weights that differ from the dynamic one's

OwnDense = Literal["nothing", "biases", "projections", "everything"]
"""Weights that only the dense network has, because training or repair changed them in the dynamic model.

``projections`` are the linears whose inputs are cut.
"""


@dataclass(frozen=True, kw_only=True)
class Network:
    """One graph to export; ``segment`` is the segment that it runs, None for a conditioning network."""

    name: str
    segment: Segment | None
    slice: Slice


def cut_networks(
    context: SliceContext,
    widths: WidthTable,
    segments: Sequence[Segment],
    *,
    baseline: bool,
    own_dense: OwnDense,
) -> list[Network]:
    """Cut one network for each segment, their conditioning network and, with ``baseline``, the dense network.

    The weights that ``own_dense`` names are read under ``STATIC_PREFIX`` + name. The dense network then has a separate
    conditioning network, and also if there is a TD-LoRA, which does not change the dense weights.
    """
    networks = [
        Network(name=segment_name(index), segment=segment, slice=slice_segment(context, segment))
        for index, segment in enumerate(segments)
    ]
    networks.append(Network(name=CONDITIONING, segment=None, slice=slice_conditioning(context)))
    if baseline:
        networks += _dense_networks(context, UnitOrder.of(widths), own_dense)
    return networks


def _dense_networks(context: SliceContext, order: UnitOrder, own: OwnDense) -> list[Network]:
    segment = dense_segment(context.spec, order)
    if own in ("nothing", "projections") and context.spec.td_lora is None:
        return [Network(name=DENSE, segment=segment, slice=_static(slice_segment(context, segment), own))]
    spec = context.spec.model_copy(update={"td_lora": None})
    static = replace(context, spec=spec, token_routers=False)
    return [
        Network(name=DENSE, segment=segment, slice=_static(slice_segment(static, segment), own)),
        Network(name=DENSE_CONDITIONING, segment=None, slice=_static(slice_conditioning(static), own)),
    ]


def _static(piece: Slice, own: OwnDense) -> Slice:
    """Return the network with the weights that ``own`` names read from the static model."""
    cut = {
        _module(source) for recipe in piece.recipes.values() if recipe.kind == "columns" for source in recipe.sources
    }

    def source(name: str) -> str:
        static = {
            "nothing": False,
            "biases": name.endswith(BIAS),
            "projections": _module(name) in cut,
            "everything": True,
        }
        return f"{STATIC_PREFIX}{name}" if static[own] else name

    recipes = {
        name: replace(recipe, sources=tuple(source(name) for name in recipe.sources))
        for name, recipe in piece.recipes.items()
    }
    return replace(piece, recipes=recipes)


def _module(name: str) -> str:
    """Return the module that a parameter belongs to."""
    return name.rpartition(".")[0]


def with_own_routers(network: Network, label: str) -> Network:
    """Return a network that reads its routers under ``label``: those of one budget among several."""

    def source(name: str) -> str:
        return f"{label}/{name}" if name.startswith(ROUTERS) else name

    recipes = {
        name: replace(recipe, sources=tuple(source(name) for name in recipe.sources))
        for name, recipe in network.slice.recipes.items()
    }
    return replace(network, slice=replace(network.slice, recipes=recipes))


def labeled_reader(readers: Mapping[str, Read]) -> Read:
    """Return a reader of the weights of several budgets: routers as ``with_own_routers`` names them, others of any."""
    first = next(iter(readers.values()))

    def read(name: str) -> Tensor:
        label, slash, own = name.partition("/")
        return readers[label](own) if slash else first(name)

    return read


def store_reader(spec: ModelSpec, dynamic: Read, static: Mapping[str, Tensor]) -> Read:
    """Return a reader of the dynamic model's weights and, under ``STATIC_PREFIX``, of the static model's.

    If only biases are the static model's, their units must be in the order of the dynamic model's weights.
    """
    read_static = dense_reader(static, spec)
    return lambda name: read_static(name[len(STATIC_PREFIX) :]) if name.startswith(STATIC_PREFIX) else dynamic(name)


def identity(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as a JSON value."""
    return {**asdict(recipe), "dtype": str(recipe.dtype)}


def plan_for(
    spec: ModelSpec,
    widths: WidthTable,
    stats: TokenStats | None,
    settings: PlanSettings,
    order: UnitOrder | None = None,
) -> SegmentPlan:
    """Choose the segments of K engines and price them. ``order`` is that of ``make_segments``."""
    return plan_of(make_segments(widths, stats, FlopsModel.of_spec(spec), settings, order), spec, widths, stats)


def plan_of(
    segments: tuple[Segment, ...], spec: ModelSpec, widths: WidthTable, stats: TokenStats | None
) -> SegmentPlan:
    """Price segments in FLOPs and bytes; ``resident_bytes`` counts a copy of the weights for each engine."""
    flops = FlopsModel.of_spec(spec)
    context = SliceContext.of(spec, widths, stats)
    slices = [slice_segment(context, segment) for segment in segments] + [slice_conditioning(context)]
    layout = lay_out(recipe for piece in slices for recipe in piece.recipes.values())
    resident = sum(piece.nbytes for piece in slices)
    return price_plan(
        segments,
        widths,
        stats,
        flops,
        disk_bytes=layout.nbytes,
        resident_bytes=resident,
        low_rank=flops.low_rank_ratio(spec.td_lora),
    )
