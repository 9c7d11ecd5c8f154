"""Constants added to width logits so that lambda meets a budget."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dyexport.flops import FlopsModel


def width_ratio(logits: tuple[np.ndarray, np.ndarray], flops: FlopsModel, shift: float) -> float:
    """Return lambda with every token if ``shift`` is added to the width logits, (P, L, U) each."""
    heads, groups = ((units + shift > 0).mean(axis=-1) for units in logits)  # (P, L)
    return float(flops.flops_ratio(heads, groups, np.ones_like(heads)).mean())


def nearest_shift(ratio: Callable[[float], float], logits: tuple[np.ndarray, np.ndarray], budget: float) -> float:
    """Return the shift with the ratio nearest to ``budget``, midway between two of the logits."""
    edges = np.unique(np.concatenate([units[np.isfinite(units)] for units in logits]))  # ascending
    edges = np.concatenate([edges[:1] - 1, edges, edges[-1:] + 1])
    shifts = -(edges[:-1] + edges[1:]) / 2
    distances = [abs(ratio(float(shift)) - budget) for shift in shifts]
    return float(shifts[np.argmin(distances)])


def solve_shift(ratio: Callable[[float], float], budget: float) -> float:
    """Solve ``ratio(x) = budget`` for an increasing function by bisection."""
    low, high = -64.0, 64.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if ratio(middle) < budget else (low, middle)
    return (low + high) / 2
