"""Where a model runs while it is being built."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def best_device() -> str:
    """The first GPU that torch sees, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def bf16_products(device: torch.device, *, enabled: bool) -> Iterator[None]:
    """Inside, products are in bf16, whatever the weights are in."""
    with warnings.catch_warnings(), torch.autocast(device.type, torch.bfloat16, enabled=enabled):
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # RMSNorm then is slower
        yield
