"""The masked torch model that a bundle is compared with, and inputs whose gates do not depend on rounding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dyexport.backbones.base import Inputs
from dyexport.bundle.plan import SegmentPlan
from dyexport.calibration.merging import merged_gates
from dyexport.calibration.quantization import QuantizedModel
from dyexport.models.dynamic import DynamicOutput, DynamicTransformer
from dyexport.models.inputs import NoisedInputs

NEAR = 1e-5  # below it, relative to the standard deviation of logits, rounding in fp32 decides the sign of a logit
MOST_TRIALS = 50  # for one timestep

Span = tuple[float, float]


class ReferenceSample(NamedTuple):
    """Inputs at one t, and the outputs for them; ``quantized`` is None for a model without quantization."""

    t: float
    inputs: Inputs
    output: DynamicOutput
    quantized: DynamicOutput | None

    @property
    def kept_tokens(self) -> Tensor:
        """Tokens that each block's MLP keeps in the engines: (B, L)."""
        return (self.quantized or self.output).tokens.sum(dim=-1)


class ReferenceModel:
    """The masked model, with inputs for which its token decisions do not depend on rounding.

    In segments with merged TD-LoRA its gates are fixed at their mean, as in the engines. ``merge_errors`` of the plan
    has the resulting error. ``quantized_model`` is fake-quantized as the engines are.
    """

    def __init__(
        self,
        model: DynamicTransformer,
        plan: SegmentPlan,
        inputs: NoisedInputs,
        quantized_model: QuantizedModel | None = None,
    ) -> None:
        self.model, self.plan, self.inputs, self.quantized_model = model, plan, inputs, quantized_model
        self.redrawn = 0

    @torch.no_grad()
    def at(self, t: float) -> tuple[Inputs, DynamicOutput]:
        """Return inputs at t, and the model's output for them."""
        for trial in range(MOST_TRIALS):
            inputs = self.inputs.at(t, trial)
            output = self._run(self.plan.segment_for(t), inputs)
            if not near_threshold(output.token_logits).any():
                break
            self.redrawn += 1
        return inputs, output

    def sample(self, t: float) -> ReferenceSample:
        """Return inputs at t, and both outputs for them."""
        inputs, output = self.at(t)
        return ReferenceSample(t, inputs, output, self._quantized(self.plan.segment_for(t), inputs))

    @torch.no_grad()
    def over(self, timesteps: Sequence[float], repeat: int) -> Iterator[ReferenceSample]:
        """Yield a sample at every t, several in one pass: a streamed model reads its weights once per pass.

        Token decisions may depend on rounding.
        """
        by_segment: dict[int, list[float]] = {}
        for t in timesteps:
            by_segment.setdefault(self.plan.segment_for(t) if self._differs_by_segment else 0, []).append(t)
        for segment, members in by_segment.items():
            for chunk in self.inputs.chunks(members):
                inputs = self.inputs.over(chunk, repeat)
                output, quantized = self._run(segment, inputs), self._quantized(segment, inputs)
                for index, t in enumerate(chunk):
                    rows = slice(index * self.inputs.batch_size, (index + 1) * self.inputs.batch_size)
                    part = None if quantized is None else _rows(quantized, rows)
                    yield ReferenceSample(t, self.inputs.at(t, repeat), _rows(output, rows), part)

    @property
    def _differs_by_segment(self) -> bool:
        return self.quantized_model is not None or any(segment.merged for segment in self.plan.segments)

    def _run(self, segment: int, inputs: Inputs) -> DynamicOutput:
        with merged_gates(self.model, self.plan.segments[segment]):
            output: DynamicOutput = self.model(inputs)
        return output

    @torch.no_grad()
    def _quantized(self, segment: int, inputs: Inputs) -> DynamicOutput | None:
        return None if self.quantized_model is None else self.quantized_model.run(segment, inputs)


def _rows(output: DynamicOutput, rows: slice) -> DynamicOutput:
    return DynamicOutput(*(part[rows] for part in output))


def near_threshold(logits: Tensor) -> Tensor:
    """Return which gates rounding may decide, shaped as ``logits``. The last dimension is that of one block's units."""
    finite = logits.masked_fill(~logits.isfinite(), 0.0)
    spread = finite.std(dim=-1, keepdim=True) if logits.shape[-1] > 1 else finite.abs()
    return logits.abs() <= NEAR * spread


def doubtful_widths(model: DynamicTransformer, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Return which width gates rounding may decide at timesteps (T,): (T, L, H), (T, L, G). None of a table's are."""
    if model.table is None:
        heads, groups = model.width_logits(timesteps)
        return near_threshold(heads), near_threshold(groups)
    heads, groups = model.width_gates(timesteps)
    return torch.zeros_like(heads, dtype=torch.bool), torch.zeros_like(groups, dtype=torch.bool)


def timestep_spans(plan: SegmentPlan, count: int) -> list[Span]:
    """Return ``count`` intervals to sample timesteps from: each segment if there are enough, and the whole range."""
    spans = [(segment.start, segment.end) for segment in plan.segments]
    spans = spans if len(spans) <= count else []
    return spans + [plan.span] * (count - len(spans))


def random_timestep(random: np.random.Generator, span: Span, end: float) -> float:
    """Return a timestep of fp32, uniform over ``span`` and below ``end``, where the range of t ends."""
    return min(float(np.float32(random.uniform(*span))), float(np.nextafter(np.float32(end), np.float32(0))))
