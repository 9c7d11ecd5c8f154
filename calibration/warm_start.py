"""Width routers that start from importance: on budget, and different at each t, before fine-tuning begins."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dyexport.calibration.unit_scores import budget_logits
from dyexport.flops import FlopsModel
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.gates import START_LOGIT


@torch.no_grad()
def start_from_importance(
    model: DynamicTransformer,
    timesteps: Sequence[float],
    importance: tuple[np.ndarray, np.ndarray],
    budget: float,
    flops: FlopsModel,
) -> None:
    """Initialize width routers so that the most important units per multiply-add are on at each t, under the budget.

    ``importance`` is that of ``rank_units`` at ``timesteps``: heads (T, L, H), groups (T, L, G). Routers interpolate
    between timesteps, as their input does. Token routers stay open. Not in the paper, where every unit starts on.
    """
    heads, groups = budget_logits(model, importance, budget, flops, ranked=True)
    finite = np.concatenate([units[np.isfinite(units)] for units in (heads, groups)])
    scale = float(finite.std()) or 1.0
    embeddings = model.timestep_embedding(torch.tensor(timesteps, dtype=torch.float32, device=model.device))  # (T, C)
    for block, router in enumerate(model.block_routers):
        for widths, logits in ((router.heads, heads), (router.groups, groups)):
            squashed = START_LOGIT * np.tanh(logits[:, block, 1:] / scale)  # (T, U - 1)
            widths.start(embeddings, torch.from_numpy(squashed).to(embeddings))
