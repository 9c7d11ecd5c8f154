"""The result of an evaluation. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal

DENSE, CONTROL, DYNAMIC = "dense", "control", "dynamic"

Unit = Literal["pixels", "latents"]


@dataclass(frozen=True, kw_only=True)
class SeedScores:
    """Scores of the samples of one seed; None for what was not scored.

    frechet           Frechet distance of features to the reference (FID)
    kernel            kernel distance to the reference (KID): mean over subsets, and ``kernel_deviation`` over them
    class_accuracy    share of samples that the classifier takes for their class label
    clip              mean CLIP score of samples and their prompts
    """

    seed: int
    frechet: float | None = None
    kernel: float | None = None
    kernel_deviation: float | None = None
    class_accuracy: float | None = None
    clip: float | None = None


@dataclass(frozen=True, kw_only=True)
class ModelScores:
    """Scores of one model: dense, control or dynamic. Means over seeds, and the scores of each seed."""

    model: str
    frechet: float | None
    kernel: float | None
    class_accuracy: float | None
    clip: float | None
    seeds: tuple[SeedScores, ...]

    @classmethod
    def of(cls, model: str, seeds: Sequence[SeedScores]) -> ModelScores:
        return cls(
            model=model,
            frechet=_mean([scores.frechet for scores in seeds]),
            kernel=_mean([scores.kernel for scores in seeds]),
            class_accuracy=_mean([scores.class_accuracy for scores in seeds]),
            clip=_mean([scores.clip for scores in seeds]),
            seeds=tuple(seeds),
        )


@dataclass(frozen=True, kw_only=True)
class PairedScores:
    """Comparison of the dynamic model's samples with the dense model's from equal noise.

    pairs        pictures, or frames of videos, that were compared
    equal        pairs without any difference, whose PSNR is infinite; means and extremes are of the others
    psnr         mean in decibels, and ``psnr_lowest``; None if all pairs are equal
    ssim         mean, and ``ssim_lowest``; None where samples are too small
    ssim_window  side of the window of SSIM: 11 is the published Gaussian, smaller ones are uniform
    data_range   of PSNR and SSIM: 1 for pixels, of latents the range of the dense model's
    """

    unit: Unit
    pairs: int
    equal: int
    psnr: float | None
    psnr_lowest: float | None
    ssim: float | None
    ssim_lowest: float | None
    ssim_window: int
    data_range: float


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Relative L2 distance of the dynamic model's latents to the dense model's after each step, from equal noise.

    ``mean`` and ``largest`` are over ``samples``, one value per step.
    """

    samples: int
    mean: tuple[float, ...]
    largest: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class GoldenCheck:
    """Result of comparing the engines with the masked model on the bundle's golden data, which must agree.

    ``error`` is None if it is not finite. It is absolute in fp32, relative in half precision.
    """

    passed: bool
    error: float | None
    tolerance: float
    timesteps: int


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """Results of ``dyexport eval``.

    unit              what was scored: pictures, or latents where nothing decodes them
    conditions        what samples are made from
    samples           of each model, for each seed
    features          feature extractor of the distances; None without a reference
    reference         real data that distances are to, of ``reference_samples`` pictures
    classifier, clip  what named classes, and the CLIP model
    frechet_real      distance of held-out real data, the score of a perfect model; None where there is none
    paired, drift     dynamic against dense from equal noise; None for a bundle without the dense network
    golden            engines against the masked model; None for a bundle without golden data
    warnings          sentences about scores that are biased or were left out
    """

    model: str
    unit: Unit
    conditions: str
    samples: int
    steps: int
    guidance: float | None
    seeds: tuple[int, ...]
    size: tuple[int, int] | None
    target: str
    flops_ratio: float
    network_flops_ratio: float
    features: str | None
    reference: str | None
    reference_samples: int | None
    classifier: str | None
    clip: str | None
    frechet_real: float | None
    models: tuple[ModelScores, ...]
    paired: PairedScores | None
    drift: Drift | None
    golden: GoldenCheck | None = None
    warnings: tuple[str, ...] = ()

    def scores(self, model: str) -> ModelScores | None:
        """Return the scores of ``dense``, ``control`` or ``dynamic``; None if it was not sampled."""
        return next((scores for scores in self.models if scores.model == model), None)

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return fmean(known) if known else None
