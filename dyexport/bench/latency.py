"""Latency measurements that are robust on a shared machine, on a CPU or a GPU."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import TypeVar

from dyexport.bench.statistics import Timing
from dyexport.errors import UsageError
from dyexport.progress import Progress

K = TypeVar("K", bound=Hashable)
Clock = Callable[[], float]
"""Function that returns the seconds at which all work that was started so far is finished."""


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


def clock_of(device: str) -> Clock:
    """Return the clock of a device.

    A GPU runs asynchronously, and each library on its streams. So its clock waits for the whole device and then
    reads the host's, which gives the latency that a caller sees. CUDA events would miss work on other streams.
    """
    if device == "cpu":
        return perf_counter
    import torch

    return waiting_clock(lambda: torch.cuda.synchronize(device))


def waiting_clock(wait: Callable[[], object], now: Clock = perf_counter) -> Clock:
    """Return a clock that calls ``wait`` before it reads the time."""

    def read() -> float:
        wait()
        return now()

    return read


def time_rounds(
    variants: Mapping[K, Callable[[], object]],
    blocks: Blocks,
    *,
    clock: Clock = perf_counter,
    progress: Progress | None = None,
) -> dict[K, Timing]:
    """Return the seconds per call of each variant.

    Compare only variants of the same call of this function: the load of the machine changes between calls.
    """
    seconds: dict[K, list[list[float]]] = {name: [] for name in variants}
    total = blocks.rounds * len(variants)
    for done in range(total):
        name = list(variants)[done % len(variants)]
        if progress is not None:
            progress(done, total)
        seconds[name].append(_block(variants[name], blocks, clock))
    return {name: Timing.of(rounds) for name, rounds in seconds.items()}


def time_variants(
    variants: Mapping[str, Callable[[], object]],
    blocks: Blocks,
    *,
    clock: Clock = perf_counter,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Return the 25th percentile of ``time_rounds``: a low one, since other processes only ever make a call longer."""
    return {name: timing.p25 for name, timing in time_rounds(variants, blocks, clock=clock, progress=progress).items()}


def _block(variant: Callable[[], object], blocks: Blocks, clock: Clock) -> list[float]:
    for _ in range(blocks.warmup):
        variant()
    return [seconds_of(variant, clock) for _ in range(blocks.timed)]


def seconds_of(variant: Callable[[], object], clock: Clock) -> float:
    """Time one call."""
    begin = clock()
    variant()
    return clock() - begin
