"""Segments by dynamic programming over the width table, and their cost."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import numpy as np

from dyexport.arguments import whole_number
from dyexport.bundle.plan import EVERY_TOKEN, Segment, SegmentPlan, TokenPath
from dyexport.bundle.tables import TokenStats, UnitOrder, WidthTable
from dyexport.errors import UsageError
from dyexport.flops import FlopsModel

ATOMS = 256  # candidate boundaries; more would change the FLOPs in the third digit only
NEARLY_ALL = 0.95  # share of kept tokens above which gathering rows costs more than it saves
DYNAMIC: TokenPath = "dynamic"
SLOT_STEPS = 4  # buckets of the dynamic path
MIN_SLOTS = 3  # in the largest bucket: the export traces it, and would take a size of 1 or 2 for a constant


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """Settings of a segment plan: ``engines`` is K.

    ``token_path`` 'auto' selects for every block the path that is fast, and exact for every input: ``compact``, or
    ``masked`` where nearly all tokens are kept.
    """

    engines: int
    token_path: str = "auto"
    capacity_margin: float = 0.02  # share of N in addition, for inputs not seen in calibration

    def __post_init__(self) -> None:
        whole_number("--engines", self.engines, least=1, most=ATOMS)
        if self.token_path not in ("auto", "masked", "capacity", "dynamic", "compact"):
            raise UsageError(f"--token-path is {self.token_path!r}; use auto, masked, capacity, dynamic or compact")


@dataclass(frozen=True, kw_only=True)
class _Atoms:
    """The width table cut into at most ``ATOMS`` cells: edges (M + 1,), units ever on (M, L, U), measure (M,)."""

    edges: np.ndarray
    any_heads: np.ndarray
    any_groups: np.ndarray
    tokens: np.ndarray  # (M, L): share of tokens the MLP runs on, in (0, 1]
    measure: np.ndarray


def make_segments(
    widths: WidthTable,
    stats: TokenStats | None,
    flops: FlopsModel,
    settings: PlanSettings,
    order: UnitOrder | None = None,
) -> tuple[Segment, ...]:
    """Return the K segments with the least expected FLOPs, every t of the range being equally likely.

    ``order`` is the storage order of units; None: the one that suits ``widths``.
    Samplers space their steps evenly in t, or nearly so. For one that does not, the plan is correct but not
    optimal.
    """
    atoms = _make_atoms(widths, stats, settings)
    cost = _interval_costs(atoms, flops, settings)
    cuts = _best_cuts(cost, min(settings.engines, len(atoms.measure)))
    order = order or UnitOrder.of(widths)
    return tuple(
        _segment(widths, stats, order, settings, float(atoms.edges[i]), float(atoms.edges[j]))
        for i, j in pairwise(cuts)
    )


def _make_atoms(widths: WidthTable, stats: TokenStats | None, settings: PlanSettings) -> _Atoms:
    starts = widths.grid
    if len(starts) > ATOMS:
        targets = np.linspace(widths.start, widths.end, ATOMS, endpoint=False)
        starts = np.unique(widths.grid[[widths.row(t) for t in targets]])  # every edge is a step of the table
    rows = np.searchsorted(widths.grid, starts)
    edges = np.append(starts, widths.end)
    cells = list(pairwise(edges))
    tokens = [_cell_tokens(stats, settings, *cell) if stats else np.ones(1) for cell in cells]
    return _Atoms(
        edges=edges,
        any_heads=np.logical_or.reduceat(widths.heads, rows, axis=0),
        any_groups=np.logical_or.reduceat(widths.groups, rows, axis=0),
        tokens=np.stack(tokens),
        measure=np.diff(edges) / (widths.end - widths.start),
    )


def _cell_tokens(stats: TokenStats, settings: PlanSettings, start: float, end: float) -> np.ndarray:
    """Return the share of tokens that each block's MLP runs on over one cell: (L,)."""
    if settings.token_path in ("auto", "compact"):
        return stats.mean_fraction([(start + end) / 2])[0]
    if settings.token_path == "masked":
        return np.ones(stats.mean.shape[1])
    return _capacity(stats, settings, start, end) / stats.tokens


def _capacity(stats: TokenStats, settings: PlanSettings, start: float, end: float) -> np.ndarray:
    """Return the tokens that each block has to hold over [start, end): (L,)."""
    margin = settings.capacity_margin * stats.tokens
    return np.clip(np.ceil(stats.highest(start, end) + margin), 1, stats.tokens)


def _interval_costs(atoms: _Atoms, flops: FlopsModel, settings: PlanSettings) -> np.ndarray:
    """Return the expected FLOPs of atoms i..j-1 served by one engine: (M, M + 1), infinite where j <= i."""
    count = len(atoms.measure)
    cost = np.full((count, count + 1), np.inf)
    for i in range(count):
        measure = np.cumsum(atoms.measure[i:])  # (M - i,)
        heads = np.logical_or.accumulate(atoms.any_heads[i:], axis=0).mean(axis=-1)  # (M - i, L)
        groups = np.logical_or.accumulate(atoms.any_groups[i:], axis=0).mean(axis=-1)  # (M - i, L)
        if settings.token_path == "capacity":
            tokens = np.maximum.accumulate(atoms.tokens[i:], axis=0)
        else:
            tokens = np.cumsum(atoms.tokens[i:] * atoms.measure[i:, None], axis=0) / measure[:, None]
        cost[i, i + 1 :] = flops.dynamic(heads, groups, tokens) * measure
    return cost


def _best_cuts(cost: np.ndarray, engines: int) -> list[int]:
    """Return the boundaries of the cheapest cover of all atoms by ``engines`` intervals: K + 1 atom indices."""
    count = cost.shape[0]
    best = np.full((engines + 1, count + 1), np.inf)
    best[0, 0] = 0.0
    came_from = np.zeros((engines + 1, count + 1), int)
    for k in range(1, engines + 1):
        total = best[k - 1, :count, None] + cost  # (M, M + 1)
        came_from[k] = total.argmin(axis=0)
        best[k] = total.min(axis=0)
    cuts = [count]
    for k in range(engines, 0, -1):
        cuts.append(int(came_from[k, cuts[-1]]))
    return cuts[::-1]


def _segment(
    widths: WidthTable,
    stats: TokenStats | None,
    order: UnitOrder,
    settings: PlanSettings,
    start: float,
    end: float,
) -> Segment:
    rows = widths.rows(start, end)
    heads, gated_heads = _union(widths.heads[rows], order.heads)
    groups, gated_groups = _union(widths.groups[rows], order.groups)
    paths, capacities, buckets = _token_paths(stats, settings, start, end, len(heads))
    return Segment(
        start=start,
        end=end,
        heads=heads,
        groups=groups,
        gated_heads=gated_heads,
        gated_groups=gated_groups,
        token_paths=paths,
        capacities=capacities,
        slot_buckets=buckets,
    )


def _union(
    masks: np.ndarray, order: tuple[tuple[int, ...], ...]
) -> tuple[tuple[tuple[int, ...], ...], tuple[bool, ...]]:
    """Return the units of each block that are ever on, in storage order, and whether one of them is ever off.

    ``masks`` are (R, L, U).
    """
    on, always = np.any(masks, axis=0), np.all(masks, axis=0)  # (L, U)
    kept = tuple(tuple(unit for unit in units if on[block, unit]) for block, units in enumerate(order))
    return kept, tuple(bool(x) for x in (on != always).any(axis=-1))


def _token_paths(
    stats: TokenStats | None, settings: PlanSettings, start: float, end: float, depth: int
) -> tuple[tuple[TokenPath, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the path and the capacity of each block, and the buckets of the dynamic path."""
    if stats is None:
        return (EVERY_TOKEN,) * depth, (0,) * depth, ()
    slots = _capacity(stats, settings, start, end)
    if settings.token_path == "dynamic":
        return _dynamic_paths(stats, slots, start, end)
    kept = stats.mean_fraction(np.linspace(start, end, 9)).mean(axis=0)  # (L,)
    paths = tuple(_static_path(settings.token_path, float(share)) for share in kept)
    return paths, tuple(int(count) for count in slots), ()


def _static_path(requested: str, kept: float) -> TokenPath:
    if requested == "auto":
        return "masked" if kept >= NEARLY_ALL else "compact"
    return cast(TokenPath, requested)


def _dynamic_paths(
    stats: TokenStats, slots: np.ndarray, start: float, end: float
) -> tuple[tuple[TokenPath, ...], tuple[int, ...], tuple[int, ...]]:
    """Return paths, capacities that even the emptiest timestep fills, and buckets of slots up to the fullest one."""
    kept = stats.counts[stats.bracket(start, end), :, -1]  # (T', L), of the fullest calibration input
    floors = np.clip(kept.min(axis=0) - 1, 0, stats.tokens - 1).astype(int)  # (L,)
    largest = max(int((slots - floors).max()), MIN_SLOTS)
    capacities = np.minimum(floors, stats.tokens - largest)  # capacity and slots together are at most all tokens
    buckets = sorted({max(round(largest * step / SLOT_STEPS), 1) for step in range(1, SLOT_STEPS + 1)})
    return (DYNAMIC,) * len(slots), tuple(int(count) for count in capacities), tuple(buckets)


def price_plan(
    segments: tuple[Segment, ...],
    widths: WidthTable,
    stats: TokenStats | None,
    flops: FlopsModel,
    *,
    disk_bytes: int,
    resident_bytes: int,
    low_rank: float = 0.0,
) -> SegmentPlan:
    """Attach FLOPs and bytes to segments; ``low_rank`` is the cost of TD-LoRA's paths relative to the dense network.

    ``SegmentPlan`` defines the ratios.
    """
    points = np.linspace(widths.start, widths.end, 2049)[:-1] + (widths.end - widths.start) / 4096
    rows = [widths.row(t) for t in points]
    heads, groups = widths.heads[rows].mean(-1), widths.groups[rows].mean(-1)  # (P, L)
    kept = stats.mean_fraction(points) if stats is not None else np.ones_like(groups)
    routed = stats is not None
    return SegmentPlan(
        segments=segments,
        flops_ratio=float(flops.flops_ratio(heads, groups, kept).mean()),
        network_flops_ratio=float(flops.network_ratio(heads, groups, kept, routed=routed).mean()) + low_rank,
        executed_flops_ratio=_executed_ratio(segments, widths, stats, flops, low_rank),
        disk_bytes=disk_bytes,
        resident_bytes=resident_bytes,
    )


def _executed_ratio(
    segments: tuple[Segment, ...], widths: WidthTable, stats: TokenStats | None, flops: FlopsModel, low_rank: float
) -> float:
    total = 0.0
    for segment in segments:
        heads = np.array([len(kept) for kept in segment.heads]) / widths.heads.shape[-1]
        groups = np.array([len(kept) for kept in segment.groups]) / widths.groups.shape[-1]
        share = (segment.end - segment.start) / (widths.end - widths.start)
        tokens = _token_share(segment, stats)
        executed = float(flops.network_ratio(heads, groups, tokens, routed=stats is not None))
        total += share * (executed + (0.0 if segment.merged else low_rank))
    return total


def _token_share(segment: Segment, stats: TokenStats | None) -> np.ndarray:
    """Return the share of tokens that each block's MLP computes: (L,)."""
    shares = np.ones(segment.depth)
    if stats is None:
        return shares
    middle = (segment.start + segment.end) / 2
    kept = stats.mean_fraction(np.linspace(segment.start, segment.end, 17)).mean(axis=0)  # (L,)
    for block, path in enumerate(segment.token_paths):
        extra = segment.slots(stats, middle) if path == "dynamic" else 0
        if path in ("capacity", "dynamic"):
            shares[block] = min((segment.capacities[block] + extra) / stats.tokens, 1.0)
        elif path == "compact":
            shares[block] = kept[block]
    return shares
