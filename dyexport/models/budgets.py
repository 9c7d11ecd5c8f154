"""Routers of one model for several FLOPs budgets: what each budget adds to their logits. Not in the paper."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn


class BudgetOffsets(nn.Module):
    """Offsets of one block's logits at each of B budgets: ``heads`` and ``groups`` (B, U), ``tokens`` (B, 1) or None.

    The routers' weights are the same at every budget. U is the length of a width router's bias. Offsets start at zero.
    """

    def __init__(self, count: int, *, heads: int, groups: int, tokens: bool) -> None:
        super().__init__()
        self.heads = nn.Parameter(torch.zeros(count, heads))
        self.groups = nn.Parameter(torch.zeros(count, groups))
        self.tokens = nn.Parameter(torch.zeros(count, 1)) if tokens else None


def budget_shares(budgets: Sequence[float], budget: float) -> Tensor:
    """Return the weight of each ascending budget in one between them, by linear interpolation: (B,).

    A budget outside their range takes the nearest.
    """
    units = np.eye(len(budgets))
    return torch.tensor([np.interp(budget, budgets, unit) for unit in units], dtype=torch.float32)
