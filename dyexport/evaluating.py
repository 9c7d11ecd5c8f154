"""``dyexport.evaluate``: scores of what a bundle samples, next to its dense network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dyexport.evaluation.report import EvalReport, GoldenCheck
from dyexport.evaluation.settings import SUBSET, EvalSettings, SamplingConfig
from dyexport.progress import Progress, no_progress

if TYPE_CHECKING:
    from dyexport.bench.sizes import Size
    from dyexport.bundle.reader import Bundle


def evaluate(
    bundle: Bundle | str | Path,
    *,
    samples: int | None = None,
    seeds: Sequence[int] = (0,),
    steps: int | None = None,
    guidance: float | None = None,
    scheduler: str | None = None,
    target: str = "onnx",
    real: str | Path | None = None,
    features: str | Path | None = None,
    subset: int = SUBSET,
    classifier: str | Path | None = None,
    prompts: Sequence[str] = (),
    pipeline: str | Path | None = None,
    clip: str | Path | None = None,
    vae: str | Path | None = None,
    size: Size | None = None,
    control: str | Path | None = None,
    progress: Progress = no_progress,
) -> EvalReport:
    """Score what a bundle samples, next to its dense network, and check its engines against the golden data.

    Every model samples ``samples`` pictures or videos with each of ``seeds``; equal seeds start from equal noise. The
    defaults of ``samples``, ``steps`` and ``guidance`` are those of ``dyexport eval``.

    ``real``, a folder of pictures or a file of features, pictures or latents, is what distances are to, and
    ``features`` computes features of pictures: ``digits``, ``emoji``, a transformers model or a TorchScript file, whose
    code is executed. ``classifier``, one of the same, names classes; ``clip`` is a CLIP model for pictures of
    ``prompts``. ``pipeline`` has text encoders and VAE, ``vae`` decodes latents of class-conditional models. ``size``
    is (height, width) in pixels for models of prompts. ``control``, a diffusers directory, is a static model to score
    as well. ``progress(done, total)`` counts denoising steps.

    >>> report = dyexport.evaluate("sit-digits-0.5", samples=20, steps=2)
    >>> [scores.model for scores in report.models], report.golden.passed
    (['dense', 'dynamic'], True)
    >>> report.paired.psnr > 0
    True

    Raises ``UsageError`` for a value out of range or one that does nothing with the bundle, ``CheckpointError`` and
    ``DataError`` for networks and references that cannot be read or do not fit, ``MissingDependencyError`` without the
    extra ``eval``, and what ``load`` raises.
    """
    from dyexport.bundle.reader import Bundle
    from dyexport.runtime.locating import find_bundle

    settings = EvalSettings(
        sampling=SamplingConfig(samples=samples, steps=steps, guidance=guidance, scheduler=scheduler),
        seeds=tuple(seeds),
        target=target,
        real=_text(real),
        features=_text(features),
        subset=subset,
        classifier=_text(classifier),
        prompts=tuple(prompts),
        pipeline=_text(pipeline),
        clip=_text(clip),
        vae=_text(vae),
        size=size,
        control=None if control is None else Path(control),
    )
    return evaluate_bundle(
        bundle if isinstance(bundle, Bundle) else Bundle.open(find_bundle(bundle)), settings, progress
    )


def evaluate_bundle(bundle: Bundle, settings: EvalSettings, progress: Progress = no_progress) -> EvalReport:
    """Check the engines against the golden data, then score samples."""
    from dyexport.evaluation.evaluate import evaluate

    golden = _golden(bundle, settings.target)
    return replace(evaluate(bundle, settings, progress), golden=golden)


def _golden(bundle: Bundle, target: str) -> GoldenCheck | None:
    from dyexport.verification.settings import VerifySettings
    from dyexport.verification.verify import verify_golden

    report = verify_golden(bundle, VerifySettings(target=target))
    if report is None:
        return None
    return GoldenCheck(passed=report.passed, error=report.error, tolerance=report.tolerance, timesteps=report.timesteps)


def _text(source: str | Path | None) -> str | None:
    return None if source is None else str(source)
