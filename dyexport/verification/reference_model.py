"""The masked torch model, which everything is compared with, on inputs that rounding cannot decide."""

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
UNDECIDED = 1e-5  # logits this near to zero, in units of their spread, may fall either way in fp32
MOST_REDRAWS = 50  # for one timestep


class ReferenceModel:
    """The masked model, and inputs on which its token decisions do not depend on rounding.

    Where a segment has TD-LoRA merged, the model's gates are at their mean too: ``merge_errors`` of the plan say
    what that costs, and everything else is compared to the last digit.
    """

    def __init__(self, model: DynamicTransformer, preset: Preset, bundle: Bundle, seed: int) -> None:
        self.model, self.plan = model, bundle.manifest.plan
        self.quantized_model = QuantizedModel(model, bundle) if bundle.manifest.model.quantization else None
        self.inputs = _inputs(preset, seed)
        self.redrawn = 0

    @torch.no_grad()
    def at(self, t: float) -> tuple[Inputs, DynamicOutput]:
        segment = self.plan.segments[self.plan.segment_for(t)]
        for draw in range(MOST_REDRAWS):
            inputs = self.inputs.at(t, draw)
            with merged_gates(self.model, segment):
                output = self.model(inputs)
            if not near_threshold(output.token_logits).any():
                break
            self.redrawn += 1
        return inputs, output

    @torch.no_grad()
    def quantized(self, t: float, inputs: Inputs) -> DynamicOutput | None:
        """The same with linear layers quantized as the engines' are; None where the bundle has none such."""
        if self.quantized_model is None:
            return None
        return self.quantized_model.run(self.plan.segment_for(t), inputs)


def near_threshold(logits: Tensor) -> Tensor:
    """Where rounding may decide a gate, given the logits of each block in the last dimension."""
    finite = logits.masked_fill(~logits.isfinite(), 0.0)
    spread = finite.std(dim=-1, keepdim=True) if logits.shape[-1] > 1 else finite.abs()
    return logits.abs() <= UNDECIDED * spread


def _inputs(preset: Preset, seed: int) -> NoisedInputs:
    """Noised digits where the model draws them, else noise."""
    if samples_digits(preset):
        try:
            data = digits("held-out")
        except MissingDependencyError:
            return NoisedInputs(preset=preset, batch_size=BATCH, seed=seed)
        return NoisedInputs(preset=preset, batch_size=BATCH, seed=seed, clean=data.batch(torch.arange(len(data))))
    return NoisedInputs(preset=preset, batch_size=BATCH, seed=seed)
