"""Score a bundle, its dense network and the control with the same sampling and metrics (``dyexport eval``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch

from dyexport.bundle.manifest import DENSE as DENSE_NETWORK
from dyexport.bundle.reader import Bundle
from dyexport.engines.registry import engine_files
from dyexport.errors import CheckpointError
from dyexport.evaluation.caveats import caveats
from dyexport.evaluation.judges import Judges, Tally, open_judges, real_distance
from dyexport.evaluation.paired import Trail, compare_latents, compare_samples
from dyexport.evaluation.report import CONTROL, DENSE, DYNAMIC, EvalReport, ModelScores, SeedScores
from dyexport.evaluation.samplers import Sampler, open_sampler
from dyexport.evaluation.scores import check_installed
from dyexport.evaluation.settings import EvalSettings
from dyexport.progress import Progress, no_progress
from dyexport.runtime.loading import load
from dyexport.runtime.sampling import device_of, no_observer
from dyexport.runtime.stock import stock_class


def evaluate(bundle: Bundle, settings: EvalSettings, progress: Progress = no_progress) -> EvalReport:
    """Score each model with each seed; equal seeds start from equal noise. One model is in memory at a time.

    ``progress(done, total)`` counts denoising steps of all samples, after the pictures of the reference. Raises
    ``UsageError`` for settings that do nothing with the bundle, and ``CheckpointError`` and ``DataError`` for networks
    and references that cannot be read or do not fit.
    """
    check_installed()
    settings.check_for(bundle)
    spec = bundle.manifest.model
    settings = settings.complete(spec)
    sampler = open_sampler(spec, settings)
    with closing(load(bundle.root, target=settings.target, check_hashes=False)) as transformer:  # reads no weights
        device = device_of(transformer)
    judges = open_judges(sampler, settings, device, progress)
    names = _models(bundle, settings)
    scores: list[ModelScores] = []
    trails: dict[str, Trail] = {}
    for index, name in enumerate(names):
        trails[name] = Trail()
        with _opened(bundle, settings, name) if name != CONTROL else _control(sampler, device) as transformer:
            part = _part(progress, index, len(names))
            seeds = score_model(transformer, sampler, judges, settings.seeds, part, trails[name])
        scores.append(ModelScores.of(name, seeds))
    return _report(bundle, settings, sampler, judges, scores, trails)


def score_model(
    transformer: Any,
    sampler: Sampler,
    judges: Judges,
    seeds: Sequence[int],
    progress: Progress = no_progress,
    trail: Trail | None = None,
) -> tuple[SeedScores, ...]:
    """Sample a model with each seed and score the samples. ``trail`` keeps the first ones, of the first seed."""
    scores = []
    for index, seed in enumerate(seeds):
        tally = Tally(judges)
        for start in range(0, sampler.samples, sampler.batch):
            rows = range(start, min(start + sampler.batch, sampler.samples))
            part = _rows(progress, index * sampler.samples + start, len(rows), len(seeds) * sampler.samples)
            kept = trail if index == 0 and trail is not None and not trail.full else None
            observe = no_observer if kept is None else kept.next()
            sampled = sampler(transformer, rows, seed, progress=part, observe=observe)
            tally.add(sampled)
            if kept is not None:
                kept.rows.append(sampled)
        scores.append(tally.scores(seed))
    return tuple(scores)


def _part(progress: Progress, index: int, parts: int) -> Progress:
    """Return the progress of one of several equal parts."""
    return lambda done, total: progress(index * total + done, parts * total)


def _rows(progress: Progress, before: int, rows: int, total: int) -> Progress:
    """Return the progress of a batch of ``rows``, as steps of samples."""
    return lambda step, steps: progress(before * steps + rows * step, total * steps)


def _models(bundle: Bundle, settings: EvalSettings) -> list[str]:
    dense = DENSE_NETWORK in bundle.engine_paths(engine_files(settings.target))
    return [*([DENSE] if dense else []), *([CONTROL] if settings.control is not None else []), DYNAMIC]


@contextmanager
def _opened(bundle: Bundle, settings: EvalSettings, name: str) -> Iterator[Any]:
    """Load one of the bundle's networks, and free it after the context."""
    with closing(load(bundle.root, target=settings.target, check_hashes=False, dense=name == DENSE)) as transformer:
        yield transformer


@contextmanager
def _control(sampler: Sampler, device: torch.device) -> Iterator[Any]:
    """Load the control, in the precision of a pipeline's latents. Raises ``CheckpointError``."""
    spec, directory = sampler.spec, sampler.settings.control
    dtype = torch.bfloat16 if sampler.conditions == "prompts" else torch.float32
    try:
        control = stock_class(spec).from_pretrained(directory, torch_dtype=dtype).eval().to(device)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the control in {directory}: {error}") from error
    control.spec = spec  # as a bundle's transformer has it
    yield control


def _report(
    bundle: Bundle,
    settings: EvalSettings,
    sampler: Sampler,
    judges: Judges,
    scores: Sequence[ModelScores],
    trails: dict[str, Trail],
) -> EvalReport:
    manifest, sampling = bundle.manifest, settings.sampling
    assert sampling.steps is not None, "the settings are complete"
    dynamic, dense = trails[DYNAMIC], trails.get(DENSE)
    height, width = sampler.size or (1, 1)
    return EvalReport(
        model=manifest.model.name,
        unit="pixels" if dynamic.pixels else "latents",
        conditions=sampler.conditions,
        samples=sampler.samples,
        steps=sampling.steps,
        guidance=sampling.guidance,
        seeds=settings.seeds,
        size=sampler.size,
        target=settings.target,
        flops_ratio=manifest.plan.flops_ratio,
        network_flops_ratio=manifest.plan.network_flops_ratio,
        features=None if judges.extractor is None else judges.extractor.name,
        reference=settings.real,
        reference_samples=None if judges.reference is None else len(judges.reference),
        classifier=None if judges.classifier is None else judges.classifier.name,
        clip=None if judges.clip is None else judges.clip.name,
        frechet_real=real_distance(settings, judges),
        models=tuple(scores),
        paired=None if dense is None else compare_samples(dynamic, dense, height / width),
        drift=None if dense is None else compare_latents(dynamic, dense),
        warnings=caveats(settings, sampler, judges, dense=dense is not None),
    )
