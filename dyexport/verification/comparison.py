"""Comparison of one output of a bundle with that of the reference. Needs no reference model."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dyexport.backbones.base import Inputs
from dyexport.bundle.reader import Bundle
from dyexport.runtime.routing import overflows, route
from dyexport.runtime.transformer import BundleTransformer


class Expected(NamedTuple):
    """The reference's output (B, ...), its kept tokens (B, L), and its output with quantized linear layers, if any."""

    sample: Tensor
    kept_tokens: np.ndarray
    quantized: Tensor | None


class Errors(NamedTuple):
    """Largest absolute error, relative error, and error over that of quantization: None without quantization."""

    absolute: float
    relative: float
    quantization_ratio: float | None


class Comparison(NamedTuple):
    """Errors at one timestep; None if tokens overflowed."""

    segment: int
    errors: Errors | None = None


@torch.no_grad()
def compare(bundle: Bundle, transformer: BundleTransformer, t: float, inputs: Inputs, expected: Expected) -> Comparison:
    """Run a bundle at t, unless more tokens are kept than a capacity holds, and compare its output."""
    plan = bundle.manifest.plan
    chosen = route(plan, bundle.widths, bundle.token_stats, t)
    if overflows(plan.segments[chosen.segment], chosen, expected.kept_tokens):
        return Comparison(chosen.segment)
    sample = transformer(**inputs).sample  # (B, C_out, H, W)
    return Comparison(chosen.segment, measure(sample, expected.sample, expected.quantized))


def measure(sample: Tensor, expected: Tensor, quantized: Tensor | None) -> Errors:
    """Measure the distance of an output to the reference's, and to that of the quantized reference."""
    difference = sample - expected
    ratio = None if quantized is None else _ratio(sample - quantized, quantized - expected)
    return Errors(float(difference.abs().max()), _ratio(difference, expected), ratio)


def _ratio(values: Tensor, others: Tensor) -> float:
    """Return the ratio of root mean squares."""
    return float(values.square().mean().sqrt() / others.square().mean().sqrt())
