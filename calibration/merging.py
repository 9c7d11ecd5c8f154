"""Whether TD-LoRA may be merged into a segment's weights: what freezing its gates at their mean costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from dyexport.bundle.manifest import Segment
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.inputs import NoisedInputs

DRAWS = 8  # inputs, each at a t of its own, that a segment's error is measured on


@contextmanager
def merged_gates(model: DynamicTransformer, segment: Segment) -> Iterator[None]:
    """The model as the engines of a segment compute it: with its gates at their mean, if it is merged."""
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
    """Squared distance of the merged segment's output to the exact one's, over its squared norm, at random t."""
    merged = segment.model_copy(update={"merged": True})
    random, apart, norm = np.random.default_rng(seed), 0.0, 0.0
    for draw in range(DRAWS):
        arguments = inputs.at(float(np.float32(random.uniform(segment.start, segment.end))), draw)
        truth = model(arguments).sample.double()
        with merged_gates(model, merged):
            apart += float((model(arguments).sample - truth).square().sum())
        norm += float(truth.square().sum())
    return apart / norm


def merge_segments(
    model: DynamicTransformer, inputs: NoisedInputs, segments: Sequence[Segment], tolerance: float
) -> tuple[tuple[Segment, ...], tuple[float, ...]]:
    """Segments, merged where that costs at most ``tolerance`` and exact elsewhere; what it costs in each."""
    errors = tuple(merge_error(model, inputs, segment) for segment in segments)
    merged = tuple(
        segment.model_copy(update={"merged": error <= tolerance})
        for segment, error in zip(segments, errors, strict=True)
    )
    return merged, errors
