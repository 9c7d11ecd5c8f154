"""TeaCache's rule on whole outputs of a network: an output is used again while the input has changed little.

Relative L1 changes of the network's input from one step to the next add up; at a threshold the network runs again and
the sum starts from zero (arXiv 2411.19108). The first and the last step always run, as in the published code.
TeaCache itself measures the modulated input of the first block, corrects it by a polynomial that is fitted to each
model, and reuses the residual of all blocks. An engine shows neither, so here the input is the noisy sample, there is
no polynomial, and the output is reused. Thresholds are fitted to each model instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


class ChangeRule:
    """Decisions of one trajectory, step by step."""

    def __init__(self, steps: int, threshold: float) -> None:
        self._last = steps - 1
        self._threshold = threshold
        self._step = 0
        self._sum = 0.0

    def computes(self, change: float) -> bool:
        """Return whether the network runs at this step, whose input has changed by ``change`` since the step before."""
        self._sum += change
        computes = self._step in (0, self._last) or self._sum >= self._threshold
        if computes:
            self._sum = 0.0
        self._step += 1
        return computes


def decisions(changes: Sequence[float], threshold: float) -> list[bool]:
    """Return the decision of each step of a trajectory; the change of the first does not matter."""
    rule = ChangeRule(len(changes), threshold)
    return [rule.computes(change) for change in changes]


def threshold_for(changes: Sequence[float], share: float) -> float:
    """Return the lowest threshold at which at most about ``share`` of the steps are computed, and the ends at least."""
    most = max(round(share * len(changes)), min(len(changes), 2))
    sums = {0.0} | {
        float(np.sum(changes[start:end])) for end in range(2, len(changes) + 1) for start in range(1, end)
    }  # the rule changes its decisions at these only
    for threshold in sorted(sums):
        if sum(decisions(changes, threshold)) <= most:
            return threshold
    return float(np.sum(changes)) + 1.0  # the ends alone


class ReusingNetwork:
    """A network whose outputs are used again by the rule; counts the calls that it computes at each step.

    A threshold of 0 computes all. ``changes`` are those of the latest trajectory.
    """

    def __init__(self, network: Any, steps: int, threshold: float) -> None:
        self.network = network
        self.device = getattr(network, "device", torch.device("cpu"))
        self.computed = np.zeros(steps)
        self.loops = 0
        self.changes: list[float] = []
        self._steps = steps
        self._threshold = threshold
        self._before = torch.empty(0)
        self._output: Any = None

    @property
    def shares(self) -> list[float]:
        """Share of trajectories that computed each step."""
        return (self.computed / max(self.loops, 1)).tolist()

    def __call__(self, *, hidden_states: torch.Tensor, **inputs: Any) -> Any:
        step = len(self.changes) % self._steps
        if step == 0:
            self.changes, self._rule = [], ChangeRule(self._steps, self._threshold)
            self.loops += 1
        self.changes.append(relative_change(hidden_states, self._before) if step else 0.0)
        self._before = hidden_states.clone()
        if self._rule.computes(self.changes[-1]):
            self.computed[step] += 1
            self._output = self.network(hidden_states=hidden_states, **inputs)
        return self._output


def relative_change(after: torch.Tensor, before: torch.Tensor) -> float:
    """Return the mean absolute difference of two inputs over the mean absolute value of the earlier."""
    return float((after - before).abs().mean() / before.abs().mean())
