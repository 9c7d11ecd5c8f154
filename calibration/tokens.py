"""Kept-token counts of every block, as a function of t."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dyexport.bundle.tables import TokenStats
from dyexport.calibration.widths import trajectory_points
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.inputs import NoisedInputs
from dyexport.progress import Progress, no_progress

LEVELS = np.array([0.5, 0.9, 0.99, 1.0])


@torch.no_grad()
def measure_tokens(
    model: DynamicTransformer,
    inputs: NoisedInputs,
    *,
    tokens: int | None = None,
    points: int = 32,
    repeats: int = 2,
    progress: Progress = no_progress,
) -> TokenStats:
    """Measure quantiles of the kept-token count per block over calibration inputs at ``points`` timesteps.

    Counts are scaled to ``tokens`` tokens if the inputs have fewer.
    """
    grid = trajectory_points(inputs.preset.timestep_range, points)
    tokens = tokens or inputs.preset.tokens
    chunks = [_counts(model, inputs, chunk, repeats) for chunk in inputs.chunks(grid.tolist(), progress)]
    counts = np.concatenate(chunks) * (tokens / inputs.preset.tokens)  # (T, B, L)
    quantiles = np.quantile(counts, LEVELS, axis=1, method="higher")  # (Q, T, L)
    return TokenStats(
        grid=grid,
        levels=LEVELS,
        counts=np.moveaxis(quantiles, 0, -1).copy(),
        mean=counts.mean(axis=1),
        tokens=tokens,
    )


def _counts(model: DynamicTransformer, inputs: NoisedInputs, timesteps: Sequence[float], repeats: int) -> np.ndarray:
    """Count the kept tokens of every sample: (T, repeats * B, L)."""
    kept = [model(inputs.over(timesteps, repeat, model.device)).tokens.sum(dim=-1) for repeat in range(repeats)]
    parts = [counts.unflatten(0, (len(timesteps), -1)) for counts in kept]  # repeats x (T, B, L)
    return torch.cat(parts, dim=1).cpu().numpy().astype(np.float64)
