"""Metrics of training steps: those that a saved state keeps, and their means, which are logged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from dyexport.errors import DyexportError


class HistoryPoint(NamedTuple):
    """Losses at one step, averaged over all processes; NaN for a loss that is not trained."""

    step: int
    diffusion: float
    complete: float
    flops_ratio: float

    def metrics(self) -> dict[str, float]:
        """Return the metrics of this step by name."""
        return {name: value for name, value in self._asdict().items() if name != "step" and not math.isnan(value)}


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Result of a run. ``flops_ratio`` is lambda of the averaged weights under hard gates; None for a static model."""

    steps: int
    history: tuple[HistoryPoint, ...] = field(repr=False)
    flops_ratio: float | None


def check_finite(point: HistoryPoint, norm: float, learning_rate: float) -> None:
    """Raise ``DyexportError`` for a step that spoils the weights. It is not saved: the last state is a good one."""
    for name, value in (("loss", point.diffusion), ("norm of the gradients", norm)):
        if not math.isfinite(value):
            raise DyexportError(
                f"the {name} is {value} at step {point.step}; lower the learning rate"
                f" ({learning_rate:g}) and check the checkpoint's weights"
            )


def mean_metrics(points: Sequence[HistoryPoint]) -> dict[str, float]:
    """Return the means over steps by name; a loss that is not trained in any of them is absent."""
    names = [name for name in HistoryPoint._fields if name != "step"]
    values = {name: [point.metrics()[name] for point in points if name in point.metrics()] for name in names}
    return {name: sum(present) / len(present) for name, present in values.items() if present}


def of_budget(name: str, budget: float | None) -> str:
    """Return the name of a metric at one of several budgets; None: there is one, or none."""
    return name if budget is None else f"{name}/{budget:g}"
