"""Percentiles of timed calls, and ratios between variants that were timed in the same rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

PERCENTILES = (25, 50, 90, 99)
LEAST_ROUNDS = 4  # fewer have no quartiles
MOST_SPREAD = 0.10  # interquartile range of the ratios of single rounds, relative to their median

Seconds = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one call: percentiles over all timed calls, and the median of each round.

    Sums and multiples are of every field, so that a step is composed of its parts: an engine and a share of the
    conditioning, or the engines of a trajectory by their shares.
    """

    p25: float
    p50: float
    p90: float
    p99: float
    rounds: tuple[float, ...]

    @classmethod
    def of(cls, seconds: Sequence[Sequence[float]] | Seconds) -> Timing:
        """Summarize the seconds of each call (rounds, calls)."""
        values = np.asarray(seconds, dtype=np.float64)
        p25, p50, p90, p99 = (float(value) for value in np.percentile(values, PERCENTILES))
        return cls(p25=p25, p50=p50, p90=p90, p99=p99, rounds=tuple(np.median(values, axis=1).tolist()))

    def __add__(self, other: Timing) -> Timing:
        return Timing(
            p25=self.p25 + other.p25,
            p50=self.p50 + other.p50,
            p90=self.p90 + other.p90,
            p99=self.p99 + other.p99,
            rounds=tuple(a + b for a, b in zip(self.rounds, other.rounds, strict=True)),
        )

    def __mul__(self, factor: float) -> Timing:
        return Timing(
            p25=self.p25 * factor,
            p50=self.p50 * factor,
            p90=self.p90 * factor,
            p99=self.p99 * factor,
            rounds=tuple(value * factor for value in self.rounds),
        )


T = TypeVar("T", float, Timing)


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Speed-up of one variant over another.

    ``value`` is the ratio of the 25th percentiles; None if it cannot be trusted. ``low`` and ``high`` are the quartiles
    of the ratios of single rounds, or the extremes of fewer than four rounds.
    """

    value: float | None
    low: float
    high: float

    @property
    def trusted(self) -> bool:
        """False if rounds disagree by more than 10 %, or are too few to tell."""
        return self.value is not None

    def __str__(self) -> str:
        if self.value is not None:
            return f"{self.value:.2f}x"
        return f"not trusted ({self.low:.2f}x to {self.high:.2f}x)"


def ratio(slow: Timing, fast: Timing) -> Ratio:
    """Return how much faster ``fast`` is than ``slow``. Both must come from the same rounds."""
    per_round = np.divide(slow.rounds, fast.rounds)  # (R,)
    few = len(per_round) < LEAST_ROUNDS
    low, middle, high = np.percentile(per_round, (0, 50, 100) if few else (25, 50, 75))
    trusted = not few and (high - low) / middle <= MOST_SPREAD
    return Ratio(value=slow.p25 / fast.p25 if trusted else None, low=float(low), high=float(high))


def over_trajectory(shares: Sequence[float], seconds: Sequence[T]) -> T:
    """Average a call over the trajectory, every t being equally likely."""
    total = sum(shares)
    parts = [value * (share / total) for share, value in zip(shares, seconds, strict=True)]
    return reduce(add, parts)


def with_conditioning(seconds: Mapping[str, T], steps: int) -> dict[str, T]:
    """Return times per step. The conditioning network runs once; each step gets an equal share of its time."""
    once = seconds["conditioning"] * (1 / steps)
    shared = {name for name in seconds if name == "dense" or name.startswith("segment")}
    per_step = {name: value + once if name in shared else value for name, value in seconds.items()}
    return {**per_step, "conditioning": once}
