"""Devices and autocast of the build side."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def best_device() -> str:
    """Return the first GPU that torch sees, or the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def bf16_products(device: torch.device, *, enabled: bool) -> Iterator[None]:
    """Run products in bf16 inside the context, for weights of any dtype."""
    with warnings.catch_warnings(), torch.autocast(device.type, torch.bfloat16, enabled=enabled):
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # RMSNorm then is slower
        yield
