"""Comparison of a bundle with the masked torch model that it was cut from. Needs the extra ``build``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from dyexport.backbones.base import Preset
from dyexport.bundle.manifest_file import RANGES
from dyexport.bundle.reader import Bundle
from dyexport.calibration.quantization import QuantizedModel, Ranges
from dyexport.checkpoints.dynamic import load_dynamic
from dyexport.checkpoints.streaming import must_stream
from dyexport.digits import samples_digits
from dyexport.errors import MissingDependencyError
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.inputs import NoisedInputs
from dyexport.pipeline.reference_model import ReferenceModel, doubtful_widths, random_timestep, timestep_spans
from dyexport.presets import preset_of
from dyexport.progress import Progress
from dyexport.runtime.transformer import BundleTransformer
from dyexport.training.data import digits
from dyexport.verification.comparison import Expected, compare
from dyexport.verification.layers import compare_layers
from dyexport.verification.report import LayerReport, ReferenceResult
from dyexport.verification.settings import TIMESTEPS, VerifySettings

BATCH = 2


class BundleReference:
    """The reference of a bundle, from a dynamic checkpoint."""

    def __init__(self, bundle: Bundle, path: Path, settings: VerifySettings) -> None:
        self.bundle, self.path, self.settings = bundle, path, settings
        model, preset = load_dynamic(path, stream=must_stream(preset_of(bundle.manifest.model).parameters))
        self.model = bundle_reference(model, preset.for_noise() if settings.small else preset, bundle, settings.seed)

    def compare(self, transformer: BundleTransformer, progress: Progress) -> ReferenceResult:
        """Compare outputs at random timesteps, and every gate of the width table."""
        comparisons = []
        timesteps = sample_timesteps(self.bundle, self.settings)
        for t in timesteps:
            sample = self.model.sample(t)
            expected = Expected(
                sample.output.sample,
                sample.kept_tokens.numpy(),
                None if sample.quantized is None else sample.quantized.sample,
            )
            comparisons.append(compare(self.bundle, transformer, t, sample.inputs, expected))
            progress(len(comparisons), len(timesteps))
        gates, wrong_gates = check_gates(self.bundle, self.model.model)
        return ReferenceResult(
            path=str(self.path),
            comparisons=comparisons,
            redrawn=self.model.redrawn,
            gates=gates,
            wrong_gates=wrong_gates,
        )

    def compare_layers(self, tolerance: float) -> LayerReport:
        """Compare every layer of the ONNX graphs."""
        return compare_layers(self.bundle, self.path, self.model, tolerance)


def bundle_reference(
    model: DynamicTransformer, preset: Preset, bundle: Bundle, seed: int | None = None
) -> ReferenceModel:
    """Return the reference of a bundle, with inputs of the size of ``preset``."""
    manifest, quantized = bundle.manifest, None
    if manifest.model.quantization is not None:
        tables = manifest.model, bundle.widths, bundle.token_stats
        quantized = QuantizedModel(model, manifest.plan, tables, Ranges.read(bundle.path(RANGES)))
    return ReferenceModel(model, manifest.plan, _inputs(preset, seed or 0), quantized)


def _inputs(preset: Preset, seed: int) -> NoisedInputs:
    """Return inputs of noised digits for a model that samples digits, else of noise."""
    if samples_digits(preset):
        try:
            data = digits("held-out")
        except MissingDependencyError:
            return NoisedInputs(preset=preset, batch_size=BATCH, seed=seed)
        return NoisedInputs(preset=preset, batch_size=BATCH, seed=seed, clean=data)
    return NoisedInputs(preset=preset, batch_size=BATCH, seed=seed)


def sample_timesteps(bundle: Bundle, settings: VerifySettings) -> list[float]:
    """Return timesteps of fp32, uniform over the range; if there are enough, at least one in each segment."""
    plan, random = bundle.manifest.plan, np.random.default_rng(settings.seed or 0)
    return [
        random_timestep(random, span, plan.span[1]) for span in timestep_spans(plan, settings.timesteps or TIMESTEPS)
    ]


@torch.no_grad()
def check_gates(bundle: Bundle, model: DynamicTransformer) -> tuple[int, int]:
    """Compare every gate of the width table with the model's, in the middle of its row.

    Returns the number of gates, and how many differ.
    """
    table = bundle.widths
    middles = (table.grid + np.append(table.grid[1:], table.end)) / 2
    timesteps = torch.from_numpy(middles.astype(np.float32))  # (T,)
    computed, doubtful = model.width_gates(timesteps), doubtful_widths(model, timesteps)  # (T, L, H), (T, L, G)
    wrong = sum(
        int(((torch.from_numpy(stored) != (gates > 0.5)) & ~either).sum())
        for stored, gates, either in zip((table.heads, table.groups), computed, doubtful, strict=True)
    )
    return sum(gates.numel() for gates in computed), wrong
