"""Exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Ema:
    """Averages of named parameters, in fp32.

    The decay rises as (1 + step) / (10 + step) up to ``decay``, so that early weights do not dominate a short run.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.parameters = parameters
        self.averages = {name: value.detach().float().clone() for name, value in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the parameters after ``step`` (0, 1, ...)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        values = [value.detach().float() for value in self.parameters.values()]
        torch._foreach_lerp_(list(self.averages.values()), values, 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Overwrite the parameters with their averages."""
        for name, value in self.parameters.items():
            value.copy_(self.averages[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Exchange the parameters and their averages inside the context. Nothing is copied, so every bit returns."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, value in self.parameters.items():
            value.data, self.averages[name] = self.averages[name], value.data
