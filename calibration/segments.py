"""Choosing segments: dynamic programming over the width table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dyexport.bundle import Segment, SegmentPlan, TokenPath
from dyexport.errors import UsageError
from dyexport.slicing.flops import FlopsModel
from dyexport.tables import TokenStats, WidthTable

ATOMS = 256  # candidate boundaries; more would change the FLOPs in the third digit only
NEARLY_ALL = 0.9  # from this share of tokens on, gathering rows costs more than it saves
ALL: TokenPath = "all"
DYNAMIC: TokenPath = "dynamic"
SLOT_STEPS = 4  # buckets of the dynamic path


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """How to cut: ``engines`` is K; ``token_path`` 'auto' picks masked or capacity block by block."""

    engines: int
    token_path: TokenPath | str = "auto"
    capacity_level: float = 1.0  # quantile of the kept-token count that a capacity holds
    capacity_margin: float = 0.02  # share of N on top, for inputs calibration has not seen

    def __post_init__(self) -> None:
        if self.engines < 1:
            raise UsageError(f"--engines is {self.engines}; a plan needs at least 1")
        if self.token_path not in ("auto", "masked", "capacity", "dynamic"):
            raise UsageError(f"--token-path is {self.token_path!r}; use auto, masked, capacity or dynamic")


@dataclass(frozen=True, kw_only=True)
class _Atoms:
    """The table cut into at most ``ATOMS`` cells: edges (M + 1,), unions and intersections (M, L, U), measure (M,)."""

    edges: np.ndarray
    any_heads: np.ndarray
    any_groups: np.ndarray
    capacity: np.ndarray  # (M, L): largest token count over the cell
    measure: np.ndarray


def make_segments(
    widths: WidthTable, stats: TokenStats | None, flops: FlopsModel, settings: PlanSettings
) -> tuple[Segment, ...]:
    """The K segments with the least expected FLOPs, every t of the range being equally likely.

    Every sampler in use spaces its steps evenly in t or nearly so; a plan stays correct, if no longer
    optimal, for one that does not.
    """
    atoms = _atomise(widths, stats, settings)
    cost = _interval_costs(atoms, flops, stats)
    cuts = _best_cuts(cost, min(settings.engines, len(atoms.measure)))
    order = unit_order(widths)
    return tuple(
        _segment(widths, stats, order, settings, float(atoms.edges[i]), float(atoms.edges[j]))
        for i, j in pairwise(cuts)
    )


def _atomise(widths: WidthTable, stats: TokenStats | None, settings: PlanSettings) -> _Atoms:
    targets = np.linspace(widths.start, widths.end, ATOMS, endpoint=False)
    starts = np.unique(widths.grid[[widths.row(t) for t in targets]])  # every edge is a step of the table
    rows = np.searchsorted(widths.grid, starts)
    edges = np.append(starts, widths.end)
    depth = widths.heads.shape[1]
    capacity = np.stack([_capacity(stats, settings, a, b, depth) for a, b in pairwise(edges)])
    return _Atoms(
        edges=edges,
        any_heads=np.logical_or.reduceat(widths.heads, rows, axis=0),
        any_groups=np.logical_or.reduceat(widths.groups, rows, axis=0),
        capacity=capacity,
        measure=np.diff(edges) / (widths.end - widths.start),
    )


def _capacity(stats: TokenStats | None, settings: PlanSettings, start: float, end: float, depth: int) -> np.ndarray:
    """Token slots each block needs over [start, end): (L,)."""
    if stats is None:
        return np.ones(depth)
    margin = settings.capacity_margin * stats.tokens
    return np.clip(np.ceil(stats.highest(start, end, settings.capacity_level) + margin), 1, stats.tokens)


def _interval_costs(atoms: _Atoms, flops: FlopsModel, stats: TokenStats | None) -> np.ndarray:
    """Expected dynamic FLOPs of serving atoms i..j-1 with one engine: (M, M + 1), infinite where j <= i."""
    count = len(atoms.measure)
    tokens = stats.tokens if stats is not None else 1
    cost = np.full((count, count + 1), np.inf)
    for i in range(count):
        heads = np.logical_or.accumulate(atoms.any_heads[i:], axis=0).mean(axis=-1)  # (M - i, L)
        groups = np.logical_or.accumulate(atoms.any_groups[i:], axis=0).mean(axis=-1)  # (M - i, L)
        slots = np.maximum.accumulate(atoms.capacity[i:], axis=0) / tokens  # (M - i, L)
        share = np.where(slots >= NEARLY_ALL, 1.0, slots)
        cost[i, i + 1 :] = flops.dynamic(heads, groups * share) * np.cumsum(atoms.measure[i:])
    return cost


def _best_cuts(cost: np.ndarray, engines: int) -> list[int]:
    """Boundaries of the cheapest cover of all atoms by ``engines`` intervals: K + 1 atom indices."""
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


def unit_order(widths: WidthTable) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Units of each block, those that are on longest first, so that unions tend to be prefixes."""
    time_on = [np.tensordot(widths.measure(), masks, axes=1) for masks in (widths.heads, widths.groups)]  # (L, U)
    heads, groups = ([np.argsort(-row, kind="stable") for row in times] for times in time_on)
    return heads, groups


def _segment(
    widths: WidthTable,
    stats: TokenStats | None,
    order: tuple[list[np.ndarray], list[np.ndarray]],
    settings: PlanSettings,
    start: float,
    end: float,
) -> Segment:
    rows = slice(widths.row(start), int(np.searchsorted(widths.grid, end)))
    heads, gated_heads = _union(widths.heads[rows], order[0])
    groups, gated_groups = _union(widths.groups[rows], order[1])
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


def _union(masks: np.ndarray, order: Sequence[np.ndarray]) -> tuple[tuple[tuple[int, ...], ...], tuple[bool, ...]]:
    """Units on at any time, in storage order, and whether they are not all on all the time: masks (R, L, U)."""
    on, always = np.any(masks, axis=0), np.all(masks, axis=0)  # (L, U)
    kept = tuple(tuple(int(u) for u in order[block] if on[block, u]) for block in range(masks.shape[1]))
    return kept, tuple(bool(x) for x in (on != always).any(axis=-1))


def _token_paths(
    stats: TokenStats | None, settings: PlanSettings, start: float, end: float, depth: int
) -> tuple[tuple[TokenPath, ...], tuple[int, ...], tuple[int, ...]]:
    """Path and capacity of each block, and the buckets of the dynamic path."""
    if stats is None:
        return (ALL,) * depth, (0,) * depth, ()
    slots = _capacity(stats, settings, start, end, depth)
    if settings.token_path == "dynamic":
        return _dynamic_paths(stats, slots, start, end)
    paths: list[TokenPath] = []
    for count in slots:
        masked = settings.token_path == "masked" or (
            settings.token_path == "auto" and count >= NEARLY_ALL * stats.tokens
        )
        paths.append("masked" if masked else "capacity")
    return tuple(paths), tuple(int(count) for count in slots), ()


def _dynamic_paths(
    stats: TokenStats, slots: np.ndarray, start: float, end: float
) -> tuple[tuple[TokenPath, ...], tuple[int, ...], tuple[int, ...]]:
    """``capacities`` are floors that even the emptiest timestep needs; buckets add what the fullest one needs."""
    measured = stats.counts[stats.bracket(start, end), :, -1]  # (T', L)
    floors = np.clip(measured.min(axis=0) - 1, 0, stats.tokens - 1).astype(int)
    widest = max(int((slots - floors).max()), 1)
    floors = np.minimum(floors, stats.tokens - widest)  # no block may be given more slots than it has tokens
    buckets = sorted({max(round(widest * step / SLOT_STEPS), 1) for step in range(1, SLOT_STEPS + 1)})
    return (DYNAMIC,) * len(slots), tuple(int(x) for x in floors), tuple(buckets)


def price_plan(
    segments: tuple[Segment, ...],
    widths: WidthTable,
    stats: TokenStats | None,
    flops: FlopsModel,
    *,
    disk_bytes: int,
    resident_bytes: int,
) -> SegmentPlan:
    """Attach FLOPs and bytes to segments. See ``SegmentPlan`` for what each ratio counts."""
    points = np.linspace(widths.start, widths.end, 2049)[:-1] + (widths.end - widths.start) / 4096
    rows = [widths.row(t) for t in points]
    heads, groups = widths.heads[rows].mean(-1), widths.groups[rows].mean(-1)  # (P, L)
    kept = stats.mean_fraction(points) if stats is not None else np.ones_like(groups)
    routers = flops.depth if stats is not None else 0
    return SegmentPlan(
        segments=segments,
        flops_ratio=float(flops.flops_ratio(heads, groups * kept).mean()),
        network_flops_ratio=float(flops.network_ratio(heads, groups * kept, routers=routers).mean()),
        executed_flops_ratio=_executed_ratio(segments, widths, stats, flops),
        disk_bytes=disk_bytes,
        resident_bytes=resident_bytes,
    )


def _executed_ratio(
    segments: tuple[Segment, ...], widths: WidthTable, stats: TokenStats | None, flops: FlopsModel
) -> float:
    total = 0.0
    for segment in segments:
        heads = np.array([len(kept) for kept in segment.heads]) / widths.heads.shape[-1]
        groups = np.array([len(kept) for kept in segment.groups]) / widths.groups.shape[-1]
        share = (segment.end - segment.start) / (widths.end - widths.start)
        routers = flops.depth if stats is not None else 0
        total += share * float(flops.network_ratio(heads, groups * _token_share(segment, stats), routers=routers))
    return total


def _token_share(segment: Segment, stats: TokenStats | None) -> np.ndarray:
    """Share of tokens each block's MLP computes: (L,)."""
    shares = np.ones(segment.depth)
    if stats is None:
        return shares
    middle = (segment.start + segment.end) / 2
    for block, path in enumerate(segment.token_paths):
        extra = segment.slots(stats, middle) if path == "dynamic" else 0
        if path in ("capacity", "dynamic"):
            shares[block] = min((segment.capacities[block] + extra) / stats.tokens, 1.0)
    return shares
