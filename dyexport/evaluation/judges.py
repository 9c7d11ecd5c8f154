"""Scores of a sample set against a reference, classes and prompts, a batch at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dyexport.errors import DataError
from dyexport.evaluation.clip import ClipScore
from dyexport.evaluation.data_sets import DATA_SETS
from dyexport.evaluation.extractors.base import Classifier, FeatureExtractor, open_classifier, open_features
from dyexport.evaluation.extractors.latents import LatentFeatures
from dyexport.evaluation.reference import read_reference
from dyexport.evaluation.report import SeedScores
from dyexport.evaluation.samplers import Rows, Sampler
from dyexport.evaluation.scores import as_pictures, frechet_distance, kernel_distance
from dyexport.evaluation.settings import EvalSettings
from dyexport.progress import Progress, no_progress


@dataclass(frozen=True, kw_only=True)
class Judges:
    """Extractors and references that samples are scored by; None for scores that are not computed.

    ``reference`` has the features of real data (n, d), ``resized`` pictures of which were of another size. ``subset``
    is that of the kernel distance.
    """

    extractor: FeatureExtractor | None = None
    reference: torch.Tensor | None = None
    resized: int = 0
    subset: int | None = None
    classifier: Classifier | None = None
    clip: ClipScore | None = None


@dataclass
class Tally:
    """Sums of the scores of one sample set, so that its pictures need not be kept."""

    judges: Judges
    features: list[torch.Tensor] = field(default_factory=list)
    right: int = 0
    labelled: int = 0
    clip: list[torch.Tensor] = field(default_factory=list)

    def add(self, rows: Rows) -> None:
        """Score a batch."""
        judges, pictures = self.judges, as_pictures(rows.values, pixels=rows.pixels)  # (n, C, H, W)
        if judges.extractor is not None:
            self.features.append(judges.extractor(pictures).cpu())
        if judges.classifier is not None and rows.labels is not None:
            self.right += int((judges.classifier(pictures).cpu() == rows.labels).sum())
            self.labelled += len(rows.labels)
        if judges.clip is not None:
            frames = len(pictures) // len(rows.prompts)
            self.clip.append(judges.clip(pictures, [text for text in rows.prompts for _ in range(frames)]))

    def scores(self, seed: int) -> SeedScores:
        """Return the scores of what was added."""
        judges = self.judges
        frechet = kernel = None
        if judges.reference is not None:
            features = torch.cat(self.features)  # (n, d)
            frechet = frechet_distance(features, judges.reference)
            if judges.subset is not None:
                kernel = kernel_distance(features, judges.reference, judges.subset)
        return SeedScores(
            seed=seed,
            frechet=frechet,
            kernel=None if kernel is None else kernel.mean,
            kernel_deviation=None if kernel is None else kernel.deviation,
            class_accuracy=self.right / self.labelled if self.labelled else None,
            clip=float(torch.cat(self.clip).mean()) if self.clip else None,
        )


def open_judges(
    sampler: Sampler, settings: EvalSettings, device: torch.device, progress: Progress = no_progress
) -> Judges:
    """Open what complete settings ask for, and read the reference. Raises ``CheckpointError`` and ``DataError``."""
    classifier = None if settings.classifier is None else open_classifier(settings.classifier)
    clip = None if settings.clip is None else ClipScore(settings.clip)
    if settings.real is None:
        return Judges(classifier=classifier, clip=clip)
    extractor = LatentFeatures() if settings.features is None else open_features(settings.features)
    real = read_reference(
        settings.real, extractor, sampler.shape, decode=sampler.decoder, device=device, progress=progress
    )
    _check_features(extractor, real.features, sampler.shape, settings.real, device)
    enough = min(sampler.pictures, len(real.features)) >= settings.subset
    return Judges(
        extractor=extractor,
        reference=real.features,
        resized=real.resized,
        subset=settings.subset if enough else None,
        classifier=classifier,
        clip=clip,
    )


def _check_features(
    extractor: FeatureExtractor, real: torch.Tensor, shape: tuple[int, ...], source: str, device: torch.device
) -> None:
    """Raise ``DataError`` if features of samples are not as many as those of the reference."""
    size = extractor(torch.zeros(1, *shape, device=device)).shape[1]
    if size != real.shape[1]:
        raise DataError(
            f"--real {source} has {real.shape[1]} features of each picture, and {extractor.name} computes {size}; give "
            "--features what computed the file, or --real pictures"
        )


def built_in_judges(name: str) -> Judges:
    """Return what scores samples of a built-in data set: its classifier and the features of its training split."""
    extractor = open_features(name)
    reference = extractor(torch.from_numpy(DATA_SETS[name].load("train").pictures))  # (n, 64)
    return Judges(extractor=extractor, reference=reference, classifier=open_classifier(name))


def real_distance(settings: EvalSettings, judges: Judges) -> float | None:
    """Return the distance of held-out pictures of a built-in data set, the score of real data; None for others."""
    if settings.real is None or settings.real not in DATA_SETS or judges.extractor is None or judges.reference is None:
        return None
    held_out = torch.from_numpy(DATA_SETS[settings.real].load("held-out").pictures)  # (n, C, H, W)
    return frechet_distance(judges.extractor(held_out), judges.reference)
