"""Timing that holds still on a shared machine, and what a bundle's times add up to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from dyexport.errors import UsageError
from dyexport.progress import Progress

PERCENTILE = 25  # what a shared machine does to a run only ever makes it longer


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Each variant runs ``warmup + timed`` times in a row, then the next one; all of it ``rounds`` times.

    Blocks, because a single run would pay for the caches that the variant before it emptied; in turn,
    because minutes later the machine is a different one.
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
    """Seconds of one call of each variant: the 25th percentile of all its timed calls.

    Only ratios between variants of one call of this function mean anything.
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
    """One engine: the share of the trajectory it serves, mean shares of the units it has and the tokens it keeps.

    ``seconds`` of one call at the middle of its interval.
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
    """What ``dyexport bench`` found. Times and ratios come from one run of ``time_variants``.

    flops_ratio           lambda: attention and MLP as gated, averaged over t; network_flops_ratio: static layers too
    executed_flops_ratio  what the graphs really run: unions of units, token capacities, routers
    seconds               of one call: dense graph, dynamic (averaged over the trajectory), torch.compile, eager
    realised              speedup_vs_dense x network_flops_ratio: 1 where every saved FLOP saves its time
    switch_overhead       share of a sampling step not spent inside an engine, all engines being resident
    resident_bytes        what the bundle with all its engines adds to a fresh process (proportional set size), weights
                          and activations; dense_bytes: what the dense graph adds. None where the system does not tell
    others                share of the CPU time that other processes took meanwhile; torch suffers most from it
    trajectory_speedup    whole sampling loops, dense over dynamic; None unless asked for
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
    realised: float
    switch_overhead: float
    others: float | None
    trajectory_speedup: float | None
    resident_bytes: int | None
    dense_bytes: int | None
    segments: tuple[SegmentTime, ...]


def over_trajectory(shares: Sequence[float], seconds: Sequence[float]) -> float:
    """Mean seconds of a call when every t is equally likely."""
    return float(np.dot(shares, seconds) / np.sum(shares))
