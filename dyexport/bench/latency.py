"""Latency measurements that are robust on a shared machine, and their summary for a bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from dyexport.errors import UsageError
from dyexport.progress import Progress

PERCENTILE = 25  # a low one: other processes only ever make a call longer


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Order of timed calls: ``warmup + timed`` calls of one variant, then of the next; all of it ``rounds`` times.

    Several calls in a row keep caches warm. Rounds spread changes of the machine's load over all variants.
    """

    rounds: int = 10
    timed: int = 4
    warmup: int = 1

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.timed < 1 or self.warmup < 0:
            raise UsageError(f"--rounds is {self.rounds}; timing needs at least 1")


def time_variants(
    variants: Mapping[str, Callable[[], object]],
    blocks: Blocks,
    *,
    clock: Callable[[], float] = perf_counter,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Return seconds per call of each variant: the 25th percentile of its timed calls.

    Compare only variants of the same call of this function: the load of the machine changes between calls.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    total = blocks.rounds * len(variants)
    for done in range(total):
        name = list(variants)[done % len(variants)]
        if progress is not None:
            progress(done, total)
        seconds[name] += _block(variants[name], blocks, clock)
    return {name: float(np.percentile(times, PERCENTILE)) for name, times in seconds.items()}


def _block(variant: Callable[[], object], blocks: Blocks, clock: Callable[[], float]) -> list[float]:
    for _ in range(blocks.warmup):
        variant()
    times = []
    for _ in range(blocks.timed):
        begin = clock()
        variant()
        times.append(clock() - begin)
    return times


@dataclass(frozen=True, kw_only=True)
class SegmentTime:
    """Measurements of one engine.

    ``share`` is its share of the trajectory; ``heads``, ``groups`` and ``tokens`` are mean kept shares.
    ``seconds`` is the time of one call at the middle of its interval.
    """

    start: float
    end: float
    share: float
    heads: float
    groups: float
    tokens: float
    seconds: float
    speedup_vs_dense: float


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """Results of ``dyexport bench``. Times and ratios come from one run of ``time_variants``.

    flops_ratio           lambda: attention and MLP as gated, averaged over t; network_flops_ratio: static layers too
    executed_flops_ratio  as the graphs run: unions of units, token capacities, routers
    seconds               of one call: dense graph, dynamic (averaged over the trajectory), torch.compile, eager
    realized              speedup_vs_dense x network_flops_ratio: 1 if time falls as much as FLOPs do
    switch_overhead       share of a sampling step not spent inside an engine, all engines being resident
    resident_bytes        memory that the bundle with all engines adds to a fresh process (proportional set size),
                          weights and activations; dense_bytes: of the dense graph. None if the system cannot tell
    others                share of CPU time used by other processes meanwhile; torch suffers most from it
    trajectory_speedup    of whole sampling loops; None unless requested
    """

    model: str
    target: str
    batch: int
    threads: int
    steps: int
    flops_ratio: float
    network_flops_ratio: float
    executed_flops_ratio: float
    seconds: Mapping[str, float]
    speedup_vs_dense: float
    speedup_vs_torch_compile: float | None
    speedup_vs_eager: float
    realized: float
    switch_overhead: float
    others: float | None
    trajectory_speedup: float | None
    resident_bytes: int | None
    dense_bytes: int | None
    segments: tuple[SegmentTime, ...]


def over_trajectory(shares: Sequence[float], seconds: Sequence[float]) -> float:
    """Average the seconds of a call, every t being equally likely."""
    return float(np.dot(shares, seconds) / np.sum(shares))
