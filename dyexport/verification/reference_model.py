"""The masked torch model that a bundle is compared with, and inputs whose gates do not depend on rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from dyexport.backbones.base import Inputs, Preset
from dyexport.bundle.reader import Bundle
from dyexport.calibration.merging import merged_gates
from dyexport.calibration.quantization import QuantizedModel
from dyexport.digits import samples_digits
from dyexport.errors import MissingDependencyError
from dyexport.models.dynamic import DynamicOutput, DynamicTransformer
from dyexport.models.inputs import NoisedInputs
from dyexport.training.data import digits

BATCH = 2
NEAR = 1e-5  # below it, relative to the standard deviation of logits, rounding in fp32 decides the sign of a logit
MOST_TRIALS = 50  # for one timestep


class ReferenceModel:
    """The masked model, with inputs for which its token decisions do not depend on rounding.

    In segments with merged TD-LoRA its gates are fixed at their mean, as in the engines. ``merge_errors`` of the plan
    has the resulting error.
    """

    def __init__(self, model: DynamicTransformer, preset: Preset, bundle: Bundle, seed: int) -> None:
        self.model, self.plan = model, bundle.manifest.plan
        self.quantized_model = QuantizedModel(model, bundle) if bundle.manifest.model.quantization else None
        self.inputs = _inputs(preset, seed)
        self.redrawn = 0

    @torch.no_grad()
    def at(self, t: float) -> tuple[Inputs, DynamicOutput]:
        """Return inputs at t, and the model's output for them."""
        segment = self.plan.segments[self.plan.segment_for(t)]
        for trial in range(MOST_TRIALS):
            inputs = self.inputs.at(t, trial)
            with merged_gates(self.model, segment):
                output = self.model(inputs)
            if not near_threshold(output.token_logits).any():
                break
            self.redrawn += 1
        return inputs, output

    @torch.no_grad()
    def quantized(self, t: float, inputs: Inputs) -> DynamicOutput | None:
        """Return the output with linear layers quantized as in the engines; None for a bundle without quantization."""
        if self.quantized_model is None:
            return None
        return self.quantized_model.run(self.plan.segment_for(t), inputs)


def near_threshold(logits: Tensor) -> Tensor:
    """Return which gates rounding may decide, shaped as ``logits``. The last dimension is that of one block's units."""
    finite = logits.masked_fill(~logits.isfinite(), 0.0)
    spread = finite.std(dim=-1, keepdim=True) if logits.shape[-1] > 1 else finite.abs()
    return logits.abs() <= NEAR * spread


def _inputs(preset: Preset, seed: int) -> NoisedInputs:
    """Return inputs of noised digits for a model that samples digits, else of noise."""
    if samples_digits(preset):
        try:
            data = digits("held-out")
        except MissingDependencyError:
            return NoisedInputs(preset=preset, batch_size=BATCH, seed=seed)
        return NoisedInputs(preset=preset, batch_size=BATCH, seed=seed, clean=data.batch(torch.arange(len(data))))
    return NoisedInputs(preset=preset, batch_size=BATCH, seed=seed)
