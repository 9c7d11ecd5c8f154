"""From t to the segment that serves it, and to the inputs its engine wants besides. Pure functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from dyexport.bundle.manifest import Segment, SegmentPlan
from dyexport.bundle.tables import FloatArray, TokenStats, WidthTable
from dyexport.engines.base import Tensors
from dyexport.engines.switching import Choice
from dyexport.errors import BundleError, EngineMismatchError
from dyexport.runtime.inputs import float_values

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Route:
    """What happens at one t.

    segment, row   indices into the plan and the width table
    gate           (W,) float32, or None where the segment's masks are constant
    slots          length of the ``slots`` input, or None where the segment has none
    token_limits   tokens that fit, for each block where not all do
    """

    segment: int
    row: int
    gate: FloatArray | None
    slots: int | None
    token_limits: tuple[int, ...]


def route(plan: SegmentPlan, widths: WidthTable, stats: TokenStats | None, t: float) -> Route:
    """Look ``t`` up. Raises ``EngineMismatchError`` outside the range of the plan."""
    index = plan.segment_for(t)
    segment, row = plan.segments[index], widths.row(t)
    slots = _slots(segment, stats, t)
    return Route(
        segment=index,
        row=row,
        gate=segment.width_gate(widths, row) if segment.gate_size else None,
        slots=slots,
        token_limits=_token_limits(segment, slots or 0),
    )


def dense_route(t: float) -> Route:
    """The route of a static model: one engine, whatever the t."""
    return Route(segment=0, row=0, gate=None, slots=None, token_limits=())


def _slots(segment: Segment, stats: TokenStats | None, t: float) -> int | None:
    if not segment.slot_buckets:
        return None
    if stats is None:
        raise BundleError("a segment has a dynamic token path but the bundle has no token statistics; build it again")
    return segment.slots(stats, t)


def _token_limits(segment: Segment, slots: int) -> tuple[int, ...]:
    spare = {"capacity": 0, "dynamic": slots}
    return tuple(segment.capacities[block] + spare[segment.token_paths[block]] for block in segment.limited_blocks)


def shared_timestep(timestep: torch.Tensor | float, batch: int) -> float:
    """The one t of a batch, read from the device once.

    Raises ``EngineMismatchError`` where samples differ in t, which needs different engines, and for no finite number.
    """

    values = float_values("timestep", timestep)
    if len(values) not in (1, batch):
        raise EngineMismatchError(f"timestep has {len(values)} values for a batch of {batch}")
    if any(value != values[0] for value in values):
        several = ", ".join(f"{value:g}" for value in sorted(set(values)))
        raise EngineMismatchError(
            f"all samples of a batch must be at the same timestep, not at {several}; call once for each"
        )
    return values[0]


@dataclass(frozen=True)
class Step:
    """A route as tensors: the choice of engine, and the limits (R,) int64 of R blocks with limited room for tokens."""

    choice: Choice
    token_limits: torch.Tensor | None = None


class Scheduler:
    """Steps by t, remembered: every image asks for the same few."""

    def __init__(self, find: Callable[[float], Route], device: str = "cpu") -> None:
        self._find = find
        self._device = device
        self.step = lru_cache(maxsize=4096)(self._step)

    def choose(self, inputs: Tensors) -> Choice:
        """What a ``SwitchingEngine`` asks."""
        timestep = inputs["timestep"]
        return self.step(shared_timestep(timestep, len(timestep))).choice

    def _step(self, t: float) -> Step:
        import torch

        found = self._find(t)
        inputs = {}
        if found.gate is not None:
            inputs["width_gate"] = torch.from_numpy(found.gate).to(self._device)  # (W,)
        if found.slots is not None:
            inputs["slots"] = torch.zeros(found.slots, dtype=torch.float32, device=self._device)  # (S,)
        limits = torch.tensor(found.token_limits, device=self._device, dtype=torch.int64)
        return Step(Choice(engine=found.segment, inputs=inputs), limits if found.token_limits else None)
