"""Measuring how many tokens each block keeps, as a function of t."""

from __future__ import annotations

import numpy as np
import torch

from dyexport.calibration.widths import trajectory_points
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.inputs import NoisedInputs
from dyexport.tables import TokenStats

LEVELS = np.array([0.5, 0.9, 0.99, 1.0])


@torch.no_grad()
def measure_tokens(model: DynamicTransformer, inputs: NoisedInputs, *, points: int = 32, draws: int = 2) -> TokenStats:
    """Quantiles of the kept-token count per block over calibration inputs at ``points`` timesteps."""
    grid = trajectory_points(inputs.preset.timestep_range, points)
    counts = np.stack([_counts(model, inputs, float(t), draws) for t in grid])  # (T, B, L)
    quantiles = np.quantile(counts, LEVELS, axis=1, method="higher")  # (Q, T, L)
    return TokenStats(
        grid=grid,
        levels=LEVELS,
        counts=np.moveaxis(quantiles, 0, -1).copy(),
        mean=counts.mean(axis=1),
        tokens=inputs.preset.tokens,
    )


def _counts(model: DynamicTransformer, inputs: NoisedInputs, t: float, draws: int) -> np.ndarray:
    """Kept tokens of each sample: (draws * B, L)."""
    kept = [model(inputs.at(t, draw, model.device)).tokens.sum(dim=-1) for draw in range(draws)]
    return torch.cat(kept).cpu().numpy().astype(np.float64)
