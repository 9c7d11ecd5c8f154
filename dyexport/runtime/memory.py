"""Placement of engines in a given amount of memory. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dyexport.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """Bytes of a bundle's weights while they are active.

    engines       of each engine
    conditioning  of the conditioning engine
    together      of all engines and their conditioning; less than the sum if they share weights
    streamable    whether an engine can run with a part of its weights in host memory
    """

    engines: tuple[int, ...]
    conditioning: int
    together: int
    streamable: bool = False


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Number of engines that stay resident, and bytes of the weights that each keeps on the device.

    ``max_resident`` None keeps all engines and the conditioning; below that, the conditioning is parked after each run.
    ``streaming_budget`` None keeps all weights.
    """

    max_resident: int | None = None
    streaming_budget: int | None = None


def place(weights: WeightBytes, memory: int) -> Placement:
    """Return the fastest placement that never holds more than ``memory`` bytes of weights.

    In this order: everything; the conditioning and as many engines as always fit; one engine whose weights are
    streamed. Raises ``UsageError`` if none of these fits.
    """
    if weights.together <= memory:
        return Placement()
    available = memory - weights.conditioning
    if (count := _fitting(weights.engines, available)) > 0:
        return Placement(max_resident=count)
    if weights.streamable and available > 0:
        return Placement(max_resident=1, streaming_budget=available)
    needed = weights.conditioning + (1 if weights.streamable else max(weights.engines))
    raise UsageError(
        f"memory of {memory} bytes holds no engine of this bundle; one and its conditioning take {needed}, "
        "and more engines at build time make smaller ones"
    )


def _fitting(engines: Sequence[int], available: int) -> int:
    """Return the largest number n such that any n of the engines fit."""
    taken = 0
    for count, size in enumerate(sorted(engines, reverse=True)):
        taken += size
        if taken > available:
            return count
    return len(engines)
