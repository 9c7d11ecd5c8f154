"""Score a bundle, its dense graph and the control model with the same sampling and metrics (``dyexport eval``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dyexport.bench.quality import Evaluator, Score, mean_accuracy, mean_frechet
from dyexport.bench.settings import SamplingConfig, check_digits
from dyexport.bundle.reader import Bundle
from dyexport.bundle.spec import ModelSpec
from dyexport.digits import Digits
from dyexport.errors import CheckpointError
from dyexport.progress import Progress
from dyexport.runtime.loading import load
from dyexport.runtime.sampling import Denoiser, sample
from dyexport.runtime.stock import stock_class

CHUNK = 300  # largest batch


def sample_digits(
    transformer: Denoiser, spec: ModelSpec, config: SamplingConfig, seed: int, progress: Progress | None = None
) -> Digits:
    """Sample a digits model. Raises ``UsageError`` for any other model."""
    check_digits(spec)
    labels = np.arange(config.samples) % spec.classes
    pictures = []
    for start in range(0, config.samples, CHUNK):
        if progress is not None:
            progress(start, config.samples)
        pixels = sample(
            transformer,
            spec,
            labels[start : start + CHUNK].tolist(),
            steps=config.steps,
            guidance_scale=config.guidance,
            scheduler=config.scheduler,
            seed=seed * 100_003 + start,
        )  # (B, 1, 8, 8)
        pictures.append(pixels.cpu().numpy())
    return Digits(np.concatenate(pictures), labels)


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """Results of ``dyexport eval``: means over seeds, and the scores of each seed by model.

    ``frechet_control`` is of the static model that was trained as long as the dynamic one, or None without one.
    ``class_accuracy`` is of the dynamic model, ``frechet_real`` of held-out real digits.
    """

    model: str
    samples: int
    steps: int
    guidance: float
    flops_ratio: float
    network_flops_ratio: float
    frechet_dense: float
    frechet_control: float | None
    frechet_dynamic: float
    frechet_real: float
    class_accuracy: float
    class_accuracy_dense: float
    class_accuracy_control: float | None
    per_seed: Mapping[str, tuple[Score, ...]]


def evaluate(
    bundle: Bundle,
    control: Path | None,
    evaluator: Evaluator,
    held_out: Digits,
    config: SamplingConfig,
    seeds: Sequence[int],
    progress: Progress | None = None,
) -> EvalReport:
    """Score each model with each seed; equal seeds start from equal noise.

    ``control`` is a diffusers directory. Raises ``UsageError`` for any other model than digits.
    """
    loaded, dense = (load(bundle.root, check_hashes=False, dense=dense) for dense in (False, True))
    models: dict[str, Denoiser] = {"dense": dense}
    if control is not None:
        models["control"] = _load_control(bundle.manifest.model, control)
    models["dynamic"] = loaded
    scores = score_models(models, bundle.manifest.model, evaluator, config, seeds, progress)
    loaded.close()
    dense.close()
    return _report(bundle, config, scores, frechet_real=evaluator.frechet(held_out.pictures))


def _load_control(spec: ModelSpec, directory: Path) -> Any:
    try:
        return stock_class(spec).from_pretrained(directory).eval()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the control in {directory}: {error}") from error


def score_models(
    models: Mapping[str, Denoiser],
    spec: ModelSpec,
    evaluator: Evaluator,
    config: SamplingConfig,
    seeds: Sequence[int],
    progress: Progress | None = None,
) -> dict[str, tuple[Score, ...]]:
    runs = [(name, seed) for name in models for seed in seeds]
    total = len(runs) * config.samples
    scores: dict[str, list[Score]] = {name: [] for name in models}
    for index, (name, seed) in enumerate(runs):
        part = _offset(progress, index * config.samples, total)
        scores[name].append(evaluator.score(sample_digits(models[name], spec, config, seed, part), seed))
    return {name: tuple(values) for name, values in scores.items()}


def _report(
    bundle: Bundle, config: SamplingConfig, scores: dict[str, tuple[Score, ...]], *, frechet_real: float
) -> EvalReport:
    manifest = bundle.manifest
    control = scores.get("control")
    return EvalReport(
        model=manifest.model.name,
        samples=config.samples,
        steps=config.steps_for(manifest.model),
        guidance=config.guidance,
        flops_ratio=manifest.plan.flops_ratio,
        network_flops_ratio=manifest.plan.network_flops_ratio,
        frechet_dense=mean_frechet(scores["dense"]),
        frechet_control=None if control is None else mean_frechet(control),
        frechet_dynamic=mean_frechet(scores["dynamic"]),
        frechet_real=frechet_real,
        class_accuracy=mean_accuracy(scores["dynamic"]),
        class_accuracy_dense=mean_accuracy(scores["dense"]),
        class_accuracy_control=None if control is None else mean_accuracy(control),
        per_seed=scores,
    )


def _offset(progress: Progress | None, done: int, total: int) -> Progress | None:
    return None if progress is None else lambda part, _: progress(done + part, total)
