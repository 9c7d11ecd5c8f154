"""Inputs on which units are ranked and models calibrated."""

from __future__ import annotations

import torch
from torch import Tensor

from dyexport.backbones.calibration_effort import CALIBRATION_SAMPLES
from dyexport.models.inputs import Chosen, NoisedInputs
from dyexport.pipeline.settings import BuildSettings
from dyexport.training.data import LatentSource, ShardDirectory


def calibration_inputs(settings: BuildSettings, source: LatentSource | None) -> NoisedInputs:
    """Return calibration inputs: noised training latents of the model's own size if there are any, else noise."""
    batch = settings.recipe.calibration.samples
    own = torch.empty(0) if source is None else _own_rows(source)
    if source is None or not len(own):
        return NoisedInputs(preset=settings.preset.for_noise(), batch_size=batch, seed=settings.seed)
    rows = own[torch.linspace(0, len(own) - 1, min(len(own), CALIBRATION_SAMPLES)).long()]
    clean = Chosen(source=source, rows=rows)
    return NoisedInputs(preset=settings.preset, batch_size=batch, seed=settings.seed, clean=clean)


def _own_rows(source: LatentSource) -> Tensor:
    return source.own_rows() if isinstance(source, ShardDirectory) else torch.arange(len(source))
