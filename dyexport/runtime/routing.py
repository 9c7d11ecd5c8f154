"""From t to the engine that serves it and to the inputs of that engine that follow from t."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from dyexport.bundle.plan import Segment, SegmentPlan
from dyexport.bundle.tables import FloatArray, TokenStats, WidthTable
from dyexport.bundle.tensors import TensorSpec
from dyexport.engines.base import Engine, EngineIO, Tensors
from dyexport.engines.switching import ROUTED_INPUTS, EngineChoice
from dyexport.errors import BundleError, EngineMismatchError
from dyexport.runtime.conditioning import Conditioner
from dyexport.runtime.inputs import float_values

if TYPE_CHECKING:
    import torch

TIMESTEP, MODULATION = "timestep", "modulation"


@dataclass(frozen=True, kw_only=True)
class Route:
    """The engine and its inputs at one t.

    segment, row   indices into the plan and the width table
    gate           (W,) float32; None if the segment's masks are constant
    slots          length of the ``slots`` input; None if the segment has none
    token_limits   token capacity of each block that has one
    """

    segment: int
    row: int
    gate: FloatArray | None
    slots: int | None
    token_limits: tuple[int, ...]


def route(plan: SegmentPlan, widths: WidthTable, stats: TokenStats | None, t: float) -> Route:
    """Return the route at ``t``. Raises ``EngineMismatchError`` outside the range of the plan."""
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
    """Return the route of a static model, which is the same at every t."""
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


def overflows(segment: Segment, chosen: Route, kept_tokens: np.ndarray) -> bool:
    """Return whether any sample keeps more tokens than a block's capacity; ``kept_tokens`` is (B, L)."""
    limits = np.array(chosen.token_limits, dtype=np.int64)  # (R,)
    return bool((kept_tokens[:, list(segment.limited_blocks)] > limits).any())


def shared_timestep(timestep: torch.Tensor | float, batch: int) -> float:
    """Return the one t of a batch, read from the device once.

    Raises ``EngineMismatchError`` if samples differ in t, which needs different engines, and for a number that is not
    finite.
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
class RoutedStep:
    """A route as tensors: the choice of engine, and the limits (R,) int64 of R blocks with a token capacity."""

    choice: EngineChoice
    token_limits: torch.Tensor | None = None


class RouteCache:
    """Routed steps by t, cached: every sample visits the same timesteps."""

    def __init__(self, find: Callable[[float], Route], device: str = "cpu") -> None:
        self._find = find
        self._device = device
        self.at = lru_cache(maxsize=4096)(self._at)

    def _at(self, t: float) -> RoutedStep:
        import torch

        route = self._find(t)
        inputs = {}
        if route.gate is not None:
            inputs["width_gate"] = torch.from_numpy(route.gate).to(self._device)  # (W,)
        if route.slots is not None:
            inputs["slots"] = torch.zeros(route.slots, dtype=torch.float32, device=self._device)  # (S,)
        limits = torch.tensor(route.token_limits, device=self._device, dtype=torch.int64)  # (R,)
        choice = EngineChoice(engine=route.segment, inputs=inputs)
        return RoutedStep(choice, limits if route.token_limits else None)


class Router:
    """The choice of a bundle's ``SwitchingEngine``, whose inputs are those of the stock network, ``timestep`` included.

    ``timestep`` (B,) decides the engine, and with the conditions (B, ...) its ``modulation``.
    """

    def __init__(self, routes: RouteCache, conditioner: Conditioner, network: Engine) -> None:
        self._routes, self._conditioner, self._network = routes, conditioner, network

    def __call__(self, inputs: Tensors) -> EngineChoice:
        """Choose the engine of a step. Raises ``EngineMismatchError`` where samples differ in t."""
        timestep = inputs[TIMESTEP]
        t = shared_timestep(timestep, len(timestep))
        conditions = {spec.name: inputs[spec.name] for spec in self._conditions}
        choice = self._routes.at(t).choice
        modulation = self._conditioner.at(t, conditions)  # (B, M)
        return EngineChoice(engine=choice.engine, inputs={**choice.inputs, MODULATION: modulation})

    @property
    def _conditions(self) -> tuple[TensorSpec, ...]:
        return tuple(spec for spec in self._conditioner.engine.io.inputs if spec.name != TIMESTEP)

    def io(self) -> EngineIO:
        """Return the bindings of all engines and their conditioning as one network."""
        network = self._network.io
        inputs = [spec for spec in network.inputs if spec.name not in ROUTED_INPUTS | {MODULATION}]
        batch = next(spec.shape[0] for spec in inputs if spec.name == "hidden_states")
        per_sample = [replace(spec, shape=(batch, *spec.shape[1:])) for spec in self._conditioner.engine.io.inputs]
        return EngineIO(inputs=(*inputs, *per_sample), outputs=network.outputs)
