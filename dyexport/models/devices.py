"""Where a model runs while it is being built."""

from __future__ import annotations

import torch


def best_device() -> str:
    """The first GPU that torch sees, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"
