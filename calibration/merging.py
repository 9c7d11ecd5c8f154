"""Merging TD-LoRA into a segment's weights, where the error of freezing its gates at their mean is small."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from dyexport.bundle.plan import Segment
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.inputs import NoisedInputs

SAMPLES = 8  # inputs, at one random t each, that a segment's error is measured on


@contextmanager
def merged_gates(model: DynamicTransformer, segment: Segment) -> Iterator[None]:
    """Fix the gates at their mean inside the context, if the segment is merged: what its engine computes."""
    if model.td_lora is None or not segment.merged:
        yield
        return
    model.td_lora.fixed = model.mean_lora_gates(segment.start, segment.end)
    try:
        yield
    finally:
        model.td_lora.fixed = None


@torch.no_grad()
def merge_error(model: DynamicTransformer, inputs: NoisedInputs, segment: Segment, seed: int = 0) -> float:
    """Measure the squared error of a merged segment's output, relative to its squared norm, at random t."""
    merged = segment.model_copy(update={"merged": True})
    random, squared_error, squared_norm = np.random.default_rng(seed), 0.0, 0.0
    for repeat in range(SAMPLES):
        arguments = inputs.at(float(np.float32(random.uniform(segment.start, segment.end))), repeat, model.device)
        exact = model(arguments).sample.double()
        with merged_gates(model, merged):
            squared_error += float((model(arguments).sample - exact).square().sum())
        squared_norm += float(exact.square().sum())
    return squared_error / squared_norm


def merge_segments(
    model: DynamicTransformer, inputs: NoisedInputs, segments: Sequence[Segment], tolerance: float
) -> tuple[tuple[Segment, ...], tuple[float, ...]]:
    """Merge the segments whose error is at most ``tolerance``; return all segments, and the error of each."""
    errors = tuple(merge_error(model, inputs, segment) for segment in segments)
    merged = tuple(
        segment.model_copy(update={"merged": error <= tolerance})
        for segment, error in zip(segments, errors, strict=True)
    )
    return merged, errors
