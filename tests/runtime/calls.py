"""Calls of a bundle's transformer with example inputs."""

from __future__ import annotations

from typing import Any

import torch

from dyexport.bundle.reader import Bundle
from dyexport.runtime.stock import example_inputs


def predict(transformer: Any, t: float | None = None) -> torch.Tensor:
    """Call the transformer at ``t``, by default in the middle of the range: (2, C, H, W)."""
    start, end = transformer.spec.timestep_range
    inputs = example_inputs(transformer.spec, 2, (start + end) / 2 if t is None else t)
    sample: torch.Tensor = transformer(**inputs).sample
    return sample


def midpoints(bundle: Bundle) -> list[float]:
    """Return one t for each engine."""
    return [(segment.start + segment.end) / 2 for segment in bundle.manifest.plan.segments]
