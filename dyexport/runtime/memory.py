"""How many engines stay resident in a given amount of memory. A pure function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dyexport.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """Weights of a bundle, by the bytes they take while active.

    ``together`` is what all engines and their conditioning take at once: less than the sum, where they share.
    ``streamable`` says whether an engine runs with a part of its weights left in host memory.
    """

    engines: tuple[int, ...]
    conditioning: int
    together: int
    streamable: bool = False


@dataclass(frozen=True, kw_only=True)
class Placement:
    """``max_resident`` None keeps every engine and the conditioning; ``streaming_budget`` None all of their weights.

    With a number, conditioning leaves as soon as it has run.
    """

    max_resident: int | None = None
    streaming_budget: int | None = None


def place(weights: WeightBytes, memory: int) -> Placement:
    """The fastest placement that never holds more than ``memory`` bytes of weights.

    In this order: everything; as many engines as fit whichever they are, beside the conditioning; one engine whose
    weights are streamed. Raises ``UsageError`` where not even that fits.
    """
    if weights.together <= memory:
        return Placement()
    room = memory - weights.conditioning
    if (count := _fitting(weights.engines, room)) > 0:
        return Placement(max_resident=count)
    if weights.streamable and room > 0:
        return Placement(max_resident=1, streaming_budget=room)
    needed = weights.conditioning + (1 if weights.streamable else max(weights.engines))
    raise UsageError(
        f"memory of {memory} bytes holds no engine of this bundle; one and its conditioning take {needed}, "
        "and more engines at build time make smaller ones"
    )


def _fitting(engines: Sequence[int], room: int) -> int:
    """The most engines of which any selection fits."""
    taken = 0
    for count, size in enumerate(sorted(engines, reverse=True)):
        taken += size
        if taken > room:
            return count
    return len(engines)
