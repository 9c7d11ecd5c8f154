"""Optimizers of training, and their moments as tensors of a saved state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dyexport.backbones.recipe import Optimizer
from dyexport.errors import missing_extras

QUANTILES = "qmap"  # prefix of tables that bitsandbytes shares between parameters


def new_optimizer(name: Optimizer, parameters: Any, learning_rate: float) -> torch.optim.Optimizer:
    """Make an optimizer of parameters or groups of them, without weight decay. Raises ``MissingDependencyError``."""
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0, fused=True)
    check_optimizer(name)
    from bitsandbytes.optim.adamw import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, lr=learning_rate, weight_decay=0)
    return optimizer


def check_optimizer(name: Optimizer) -> None:
    """Raise ``MissingDependencyError`` without the library of an optimizer."""
    if name == "adamw-8bit":
        with missing_extras():
            import bitsandbytes  # noqa: F401


def stored_moments(moments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what an optimizer keeps of a parameter as tensors that share no memory."""
    return {
        name: value.clone() if name.startswith(QUANTILES) else torch.as_tensor(value) for name, value in moments.items()
    }


def restored_moments(stored: Mapping[str, Tensor], device: torch.device) -> dict[str, Any]:
    """Return the inverse of ``stored_moments``; whole numbers are steps that bitsandbytes counts."""
    return {name: int(value) if value.dtype == torch.int64 else value.to(device) for name, value in stored.items()}
