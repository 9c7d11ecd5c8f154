"""An engine without a backend, for tests of code that drives engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dyexport.engines.base import Engine, EngineIO, Tensors, WeightSpan

if TYPE_CHECKING:
    import torch


class FakeEngine(Engine):
    """A Python function as an engine, which counts calls."""

    def __init__(
        self,
        io: EngineIO,
        function: Callable[[Tensors], dict[str, torch.Tensor]],
        *,
        weights: tuple[WeightSpan, ...] = (),
    ) -> None:
        self._io = io
        self._weights = weights
        self._function = function
        self._active = False
        self._parked = False
        self.activations = 0
        self.runs = 0
        self.parks = 0
        self.closes = 0

    @property
    def io(self) -> EngineIO:
        return self._io

    @property
    def weights(self) -> tuple[WeightSpan, ...]:
        return self._weights

    @property
    def shares_weights(self) -> bool:
        return False

    @property
    def active(self) -> bool:
        return self._active

    @property
    def parked(self) -> bool:
        """True if ``close`` has something left to free, though not the weights."""
        return self._parked

    def activate(self) -> None:
        self.activations += not self._active
        self._active, self._parked = True, False

    def run(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        self.io.check(inputs)
        self.activate()
        self.runs += 1
        return self._function(inputs)

    def park(self) -> None:
        self.parks += self._active
        self._active, self._parked = False, self._active or self._parked

    def close(self) -> None:
        self.closes += self._active or self._parked
        self._active = self._parked = False
