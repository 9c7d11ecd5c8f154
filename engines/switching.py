"""An engine made of engines, one per segment of t, each activated when sampling reaches it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from dyexport.engines.base import Engine, EngineIO, Tensors, WeightSpan
from dyexport.errors import UsageError

if TYPE_CHECKING:
    import torch

ROUTED_INPUTS = frozenset({"width_gate", "slots"})  # inputs of a network that follow from t alone


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """Index of the engine that serves some inputs, and the inputs of that engine that follow from them."""

    engine: int
    inputs: Tensors


@dataclass(frozen=True, kw_only=True)
class SwitchCost:
    """Number of switches between two engines, and the seconds they took in total."""

    count: int = 0
    seconds: float = 0.0


@dataclass(kw_only=True)
class Clock:
    """Time spent by a ``SwitchingEngine``, in seconds. ``activations`` includes those in the background."""

    run_seconds: float = 0.0
    activations: list[int]
    activation_seconds: list[float]
    switches: dict[tuple[int | None, int], SwitchCost]


class SwitchingEngine(Engine):
    """Runs inputs on the engine that ``choose`` names, completed by what ``choose`` computes from them.

    At most ``max_resident`` engines are active (default: all); the least recently used one is parked to make room.
    While engine i runs, engine ``i + ahead`` is activated in the background: ``ahead`` is the direction in which
    sampling visits the engines. ``make_io`` returns the bindings of the whole, by default those of the first engine
    without the inputs that follow from t. Not thread-safe.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        choose: Callable[[Tensors], EngineChoice],
        *,
        ahead: int = 1,
        max_resident: int | None = None,
        make_io: Callable[[], EngineIO] | None = None,
    ) -> None:
        if max_resident is not None and max_resident < 1:
            raise UsageError(f"max_resident is {max_resident}; at least one engine must be resident")
        self.engines = tuple(engines)
        self.max_resident = max_resident or len(self.engines)
        self._choose = choose
        self._make_io = make_io or self._first_io
        self._ahead = ahead
        self._current: int | None = None
        self._recent: list[int] = []  # activated engines, least recently used first
        self._pending: Future[None] | None = None
        self._background: ThreadPoolExecutor | None = None
        count = len(self.engines)
        self.clock = Clock(activations=[0] * count, activation_seconds=[0.0] * count, switches={})

    @property
    def io(self) -> EngineIO:
        return self._make_io()

    def _first_io(self) -> EngineIO:
        first = self.engines[0].io
        return EngineIO(
            inputs=tuple(spec for spec in first.inputs if spec.name not in ROUTED_INPUTS), outputs=first.outputs
        )

    @property
    def weights(self) -> tuple[WeightSpan, ...]:
        return tuple(dict.fromkeys(span for engine in self.engines for span in engine.weights))

    @property
    def shares_weights(self) -> bool:
        return all(engine.shares_weights for engine in self.engines)

    @property
    def active(self) -> bool:
        return any(engine.active for engine in self.engines)

    def activate(self) -> None:
        """Activate the engine that sampling starts with; the others are activated when they are needed."""
        if not self.active:
            self._load(0 if self._ahead > 0 else len(self.engines) - 1)

    def run(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        self.io.check(inputs)
        choice = self._choose(inputs)
        names = {spec.name for spec in self.engines[choice.engine].io.inputs} - choice.inputs.keys()
        return self.run_on(choice, {name: inputs[name] for name in names})

    def run_on(self, choice: EngineChoice, inputs: Tensors) -> dict[str, torch.Tensor]:
        """Run an engine that the caller has chosen, on the rest of its inputs."""
        engine = self._switch_to(choice.engine)
        self._prefetch(choice.engine + self._ahead)
        begin = perf_counter()
        outputs = engine.run({**inputs, **choice.inputs})
        self.clock.run_seconds += perf_counter() - begin
        return outputs

    def close(self) -> None:
        self._settle()
        for engine in self.engines:
            engine.close()
        if self._background is not None:
            self._background.shutdown()
            self._background = None
        self._recent.clear()
        self._current = None

    def _switch_to(self, index: int) -> Engine:
        engine = self.engines[index]
        if index == self._current and engine.active:
            return engine
        begin = perf_counter()
        self._settle()
        self._load(index)
        self._record_switch(index, perf_counter() - begin)
        self._current = index
        return engine

    def _record_switch(self, index: int, seconds: float) -> None:
        cost = self.clock.switches.get((self._current, index), SwitchCost())
        cost = SwitchCost(count=cost.count + 1, seconds=cost.seconds + seconds)
        self.clock.switches[self._current, index] = cost

    def _load(self, index: int) -> None:
        """Activate an engine as the most recently used one, and park others to make room."""
        if index in self._recent:
            self._recent.remove(index)
        while len(self._recent) >= self.max_resident:
            self.engines[self._recent.pop(0)].park()
        if not self.engines[index].active:
            begin = perf_counter()
            self.engines[index].activate()
            self.clock.activations[index] += 1
            self.clock.activation_seconds[index] += perf_counter() - begin
        self._recent.append(index)

    def _prefetch(self, index: int) -> None:
        """Activate an engine in the background. The running one is the most recently used, so it is not parked."""
        possible = 0 <= index < len(self.engines) and self.max_resident > 1 and self._pending is None
        if possible and not self.engines[index].active:
            if self._background is None:
                self._background = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
            self._pending = self._background.submit(self._load, index)

    def _settle(self) -> None:
        """Wait for the background. If it failed, activation fails again in the foreground, and raises there."""
        if self._pending is not None:
            self._pending.exception()
            self._pending = None
