"""How good generated digits are: Frechet distance and class accuracy, by a classifier trained on the real ones.

The classifier is a multilayer perceptron on the training split (80 %) of scikit-learn's digits, always
with the same seed; its features are the 64 activations before the last layer. Distances are to the
features of that same split, as FID's on ImageNet are to its training set; ``frechet_real``, the
distance of the held-out 20 %, says what real digits would score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from dyexport.bundle import ModelSpec
from dyexport.errors import MissingDependency, UsageError
from dyexport.runtime.sampling import Denoiser, sample

Array = np.ndarray
Progress = Callable[[int, int], None]

CHUNK = 300  # pictures drawn at a time


@dataclass(frozen=True)
class Digits:
    """Pictures (n, 1, 8, 8) with values in [0, 1], and their classes (n,)."""

    pictures: Array
    labels: Array


class DigitClassifier:
    """Tells digits apart, and says by which features."""

    def __init__(self, digits: Digits) -> None:
        try:
            from sklearn.neural_network import MLPClassifier
        except ImportError as error:
            raise MissingDependency("scikit-learn", "demo") from error
        self._network: Any = MLPClassifier((128, 64), alpha=0.1, max_iter=1000, random_state=0)
        self._network.fit(_flat(digits.pictures), digits.labels)

    def features(self, pictures: Array) -> Array:
        """Activations before the last layer: (n, 1, 8, 8) -> (n, 64)."""
        values = _flat(pictures)
        for weight, bias in zip(self._network.coefs_[:-1], self._network.intercepts_[:-1], strict=True):
            values = np.maximum(values @ weight + bias, 0)
        return values

    def accuracy(self, digits: Digits) -> float:
        """Share of pictures taken for the class that they should show."""
        return float(np.mean(self._network.predict(_flat(digits.pictures)) == digits.labels))


def _flat(pictures: Array) -> Array:
    return pictures.reshape(len(pictures), -1).astype(np.float64)  # (n, 64)


def frechet_distance(left: Array, right: Array) -> float:
    """Between Gaussians fitted to two sets of features (n, d), (m, d) (arXiv 1706.08500)."""
    means = (left.mean(axis=0), right.mean(axis=0))
    covariances = (np.cov(left, rowvar=False), np.cov(right, rowvar=False))
    return gaussian_frechet(means, covariances)


def gaussian_frechet(means: tuple[Array, Array], covariances: tuple[Array, Array]) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), for means (d,) and covariances (d, d).

    The trace of that root is the nuclear norm of C1^(1/2) C2^(1/2): real, and stable where features
    are constant or outnumber the samples.
    """
    roots = [_square_root(covariance) for covariance in covariances]
    shared = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    distance = np.square(means[0] - means[1]).sum() + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * shared
    return max(float(distance), 0.0)


def _square_root(covariance: Array) -> Array:
    values, vectors = np.linalg.eigh(covariance)
    root: Array = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T  # (d, d)
    return root


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How samples are drawn: ``samples`` pictures, every class equally often."""

    samples: int = 1800
    steps: int = 50
    guidance: float = 1.0
    scheduler: str | None = None

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise UsageError(f"--samples is {self.samples}; a distance needs at least 2")


def draw_digits(
    transformer: Denoiser, spec: ModelSpec, drawing: Drawing, seed: int, progress: Progress | None = None
) -> Digits:
    """Sample a model of the digits. Raises ``UsageError`` for a model of anything else."""
    if spec.latent_shape != (1, 8, 8) or not spec.pixel_space:
        raise UsageError(f"{spec.name} does not draw digits, and there is nothing here to score its pictures by")
    labels = np.arange(drawing.samples) % spec.classes % 10
    pictures = []
    for start in range(0, drawing.samples, CHUNK):
        if progress is not None:
            progress(start, drawing.samples)
        drawn = sample(
            transformer,
            spec,
            labels[start : start + CHUNK].tolist(),
            steps=drawing.steps,
            guidance_scale=drawing.guidance,
            scheduler=drawing.scheduler,
            seed=seed * 100_003 + start,
        )  # (B, 1, 8, 8)
        pictures.append(drawn.cpu().numpy())
    return Digits(np.concatenate(pictures), labels)


@dataclass(frozen=True, kw_only=True)
class Score:
    seed: int
    frechet: float
    class_accuracy: float


class Judge:
    """Scores pictures against real digits: ``train`` makes the classifier and the reference."""

    def __init__(self, train: Digits) -> None:
        self.classifier = DigitClassifier(train)
        self.reference = self.classifier.features(train.pictures)  # (n, 64)

    def frechet(self, pictures: Array) -> float:
        return frechet_distance(self.classifier.features(pictures), self.reference)

    def score(self, digits: Digits, seed: int) -> Score:
        frechet, accuracy = self.frechet(digits.pictures), self.classifier.accuracy(digits)
        return Score(seed=seed, frechet=frechet, class_accuracy=accuracy)


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """What ``dyexport eval`` found: means over seeds, and each seed's scores by model.

    ``frechet_control`` is the static model trained as long as the dynamic one; None where there is none.
    ``class_accuracy`` is the dynamic model's; ``frechet_real`` what held-out real digits score.
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
    models: Mapping[str, Denoiser],
    spec: ModelSpec,
    judge: Judge,
    drawing: Drawing,
    seeds: Sequence[int],
    progress: Progress | None = None,
) -> dict[str, tuple[Score, ...]]:
    """Score each model with each seed; equal seeds start from equal noise."""
    runs = [(name, seed) for name in models for seed in seeds]
    total = len(runs) * drawing.samples
    scores: dict[str, list[Score]] = {name: [] for name in models}
    for index, (name, seed) in enumerate(runs):
        part = _offset(progress, index * drawing.samples, total)
        scores[name].append(judge.score(draw_digits(models[name], spec, drawing, seed, part), seed))
    return {name: tuple(found) for name, found in scores.items()}


def _offset(progress: Progress | None, done: int, total: int) -> Progress | None:
    return None if progress is None else lambda part, _: progress(done + part, total)


def mean_frechet(scores: Sequence[Score]) -> float:
    return fmean(score.frechet for score in scores)


def mean_accuracy(scores: Sequence[Score]) -> float:
    return fmean(score.class_accuracy for score in scores)
