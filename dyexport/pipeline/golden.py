"""The stage that makes golden data: inputs, and what the masked model computes for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, sqrt
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dyexport import __version__
from dyexport.backbones.base import Inputs, Preset
from dyexport.bundle.golden import GOLDEN, GoldenData, GoldenInfo, GoldenSample, InputSource, reference_identity
from dyexport.bundle.plan import Segment, SegmentPlan
from dyexport.calibration.quantization import QuantizedModel, Ranges
from dyexport.checkpoints.dynamic import load_dynamic
from dyexport.checkpoints.static import load_static
from dyexport.checkpoints.streaming import must_stream
from dyexport.digits import samples_digits
from dyexport.models.inputs import Chosen, NoisedInputs
from dyexport.pipeline.export_stages import CalibratedModel
from dyexport.pipeline.reference_model import (
    ReferenceModel,
    ReferenceSample,
    doubtful_widths,
    near_threshold,
    random_timestep,
    timestep_spans,
)
from dyexport.pipeline.run import Run
from dyexport.pipeline.settings import SYNTHETIC, BuildSettings
from dyexport.progress import Progress
from dyexport.runtime.routing import overflows, route
from dyexport.stages.file_records import digest_of
from dyexport.stages.ledger import Outcome
from dyexport.training.data import digits

BATCH = 2
LEAST = 4  # timesteps
ATTEMPTS = 8  # for a timestep; each costs a pass, so after the last one an input stays as it is
CLEAN = 64  # samples that inputs are made of


@dataclass(frozen=True, kw_only=True)
class GoldenSampler:
    """The masked model of a build, which golden data is sampled from."""

    settings: BuildSettings
    model: CalibratedModel
    plan: SegmentPlan
    ranges: Outcome | None

    @property
    def count(self) -> int:
        return max(len(self.plan.segments), LEAST)

    @property
    def preset(self) -> Preset:
        """The model's preset at the size of golden inputs."""
        return golden_preset(self.settings.preset, self.plan.segments)

    @property
    def source(self) -> InputSource:
        """Source of latents: never data of the user, which a published bundle would show."""
        if samples_digits(self.preset) and self.settings.data_source == "digits":
            return "digits"
        own = self.settings.data_source == SYNTHETIC and self.preset == self.settings.preset
        return "synthetic" if own else "noise"

    @torch.no_grad()
    def make(self, progress: Progress, out: Path) -> None:
        """Write golden data. ``progress(done, total)`` counts timesteps."""
        stream = must_stream(self.settings.preset.parameters, self.settings.memory)
        reference = self._reference(stream)
        samples, resampled = self._sample(reference, progress)
        golden = [_stored(sample) for sample in samples]
        if self.settings.baseline:
            dense = load_static(str(self.model.static.path), self.settings.preset, stream=stream)
            for index in sorted({0, len(samples) - 1}):
                golden[index] = _with_dense(golden[index], reference, dense, samples[index].inputs)
        info = GoldenInfo(
            identity=reference_identity(self.model.calibrated.digest, self.model.spec, self.plan.segments),
            dyexport_version=__version__,
            source=self.source,
            seed=self.settings.seed,
            timesteps=len(golden),
            batch=BATCH,
            tokens=self.preset.tokens,
            text_tokens=self.preset.text_tokens,
            resampled=resampled,
        )
        GoldenData(info=info, samples=tuple(golden)).save(out)

    def _reference(self, stream: bool) -> ReferenceModel:
        model, _ = load_dynamic(self.model.path, stream=stream)
        quantized = None
        if self.ranges is not None:
            quantized = QuantizedModel(model, self.plan, self.model.tables, Ranges.read(self.ranges.path))
        return ReferenceModel(model, self.plan, self._inputs(), quantized)

    def _inputs(self) -> NoisedInputs:
        clean = None
        if self.source != "noise":
            data = digits("held-out") if self.source == "digits" else self.model.data.source
            assert data is not None
            clean = Chosen(source=data, rows=torch.arange(min(len(data), CLEAN)))
        return NoisedInputs(preset=self.preset, batch_size=BATCH, seed=self.settings.seed, clean=clean)

    def _sample(self, reference: ReferenceModel, progress: Progress) -> tuple[list[ReferenceSample], int]:
        """Sample all timesteps; return the samples, and how many were replaced."""
        random, spans = np.random.default_rng(self.settings.seed), timestep_spans(self.plan, self.count)
        samples: dict[int, ReferenceSample] = {}
        pending, resampled = list(range(len(spans))), 0
        for attempt in range(ATTEMPTS):
            progress(len(spans) - len(pending), len(spans))
            timesteps = [random_timestep(random, spans[slot], self.plan.span[1]) for slot in pending]
            sampled = {sample.t: sample for sample in reference.over(timesteps, attempt)}
            samples |= {slot: sampled[t] for slot, t in zip(pending, timesteps, strict=True)}
            pending = [slot for slot in pending if not self._decided(reference, samples[slot])]
            if not pending:
                break
            resampled += len(pending)
        progress(len(spans), len(spans))
        return [samples[slot] for slot in range(len(spans))], resampled

    def _decided(self, reference: ReferenceModel, sample: ReferenceSample) -> bool:
        """Return whether no gate depends on rounding, and the kept tokens fit into the capacities."""
        undecided = [
            near_threshold(sample.output.token_logits),
            *doubtful_widths(reference.model, torch.tensor([sample.t])),
        ]
        _, widths, stats = self.model.tables
        chosen = route(self.plan, widths, stats, sample.t)
        fits = not overflows(self.plan.segments[chosen.segment], chosen, sample.kept_tokens.numpy())
        return fits and not any(bool(part.any()) for part in undecided)


def _stored(sample: ReferenceSample) -> GoldenSample:
    return GoldenSample(
        inputs={name: tensor.numpy() for name, tensor in sample.inputs.items()},
        sample=sample.output.sample.numpy(),
        heads=(sample.output.heads[0] > 0.5).numpy(),
        groups=(sample.output.groups[0] > 0.5).numpy(),
        kept_tokens=sample.kept_tokens.to(torch.int64).numpy(),
        quantized=None if sample.quantized is None else sample.quantized.sample.numpy(),
    )


def _with_dense(golden: GoldenSample, reference: ReferenceModel, dense: nn.Module, inputs: Inputs) -> GoldenSample:
    """Add the output of the static model."""
    output, quantized = reference.model.adapter.run(dense, inputs), None
    if reference.quantized_model is not None:
        quantized = reference.quantized_model.run_dense(dense, inputs).numpy()
    return replace(golden, dense=output.numpy(), quantized_dense=quantized)


def golden_preset(preset: Preset, segments: Sequence[Segment]) -> Preset:
    """Return the size of golden inputs: that of calibration on noise, but no smaller than a token capacity."""
    small, least = preset.for_noise(), max(segment.largest_capacity for segment in segments)
    if small.tokens >= least:
        return small
    grown = small.with_tokens(ceil(sqrt(least)) ** 2)
    return grown if grown.tokens >= least else preset


def golden_data(run: Run, model: CalibratedModel, plan: SegmentPlan, ranges: Outcome | None) -> Outcome:
    """Sample inputs at random timesteps, at least one in each segment, and run the masked model on them."""
    settings = run.settings
    sampler = GoldenSampler(settings=settings, model=model, plan=plan, ranges=ranges)
    inputs = {
        "dyexport": __version__,
        "model": [model.calibrated.digest, model.static.digest if settings.baseline else None],
        "segments": digest_of([segment.model_dump(mode="json") for segment in plan.segments]),
        "ranges": None if ranges is None else ranges.digest,
        "source": [sampler.source, model.data.digest if sampler.source == "synthetic" else None],
        "settings": [settings.seed, sampler.count],
    }
    return run.stage("golden", GOLDEN, inputs, partial(sampler.make, run.progress("golden")))
