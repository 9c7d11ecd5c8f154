"""Quality of generated digits: Frechet distance and class accuracy, by a classifier trained on real digits.

The classifier is a multilayer perceptron on the training split (80 %) of scikit-learn's digits, always
with the same seed; its features are the 64 activations before the last layer. Distances are to the
features of that same split, as FID's on ImageNet are to its training set. ``frechet_real``, the
distance of the held-out 20 %, is the score of real digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from dyexport.digits import Digits
from dyexport.errors import MissingDependencyError

Array = np.ndarray


class DigitClassifier:
    """Classifier of digits, and the features that it uses."""

    def __init__(self, digits: Digits) -> None:
        try:
            from sklearn.neural_network import MLPClassifier
        except ImportError as error:
            raise MissingDependencyError("scikit-learn", "demo") from error
        self._network: Any = MLPClassifier((128, 64), alpha=0.1, max_iter=1000, random_state=0)
        self._network.fit(_flat(digits.pictures), digits.labels)

    def features(self, pictures: Array) -> Array:
        """Compute the activations before the last layer: (n, 1, 8, 8) -> (n, 64)."""
        values = _flat(pictures)
        for weight, bias in zip(self._network.coefs_[:-1], self._network.intercepts_[:-1], strict=True):
            values = np.maximum(values @ weight + bias, 0)
        return values

    def accuracy(self, digits: Digits) -> float:
        """Return the share of pictures that are classified as their label."""
        return float(np.mean(self._network.predict(_flat(digits.pictures)) == digits.labels))


def _flat(pictures: Array) -> Array:
    return pictures.reshape(len(pictures), -1).astype(np.float64)  # (n, 64)


def frechet_distance(left: Array, right: Array) -> float:
    """Compare Gaussians fitted to two sets of features (n, d), (m, d) (arXiv 1706.08500)."""
    means = (left.mean(axis=0), right.mean(axis=0))
    covariances = (np.cov(left, rowvar=False), np.cov(right, rowvar=False))
    return gaussian_frechet(means, covariances)


def gaussian_frechet(means: tuple[Array, Array], covariances: tuple[Array, Array]) -> float:
    """Compute |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) for means (d,) and covariances (d, d).

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
class Score:
    seed: int
    frechet: float
    class_accuracy: float


class Evaluator:
    """Scores of pictures against real digits; ``train`` trains the classifier and is the reference."""

    def __init__(self, train: Digits) -> None:
        self.classifier = DigitClassifier(train)
        self.reference = self.classifier.features(train.pictures)  # (n, 64)

    def frechet(self, pictures: Array) -> float:
        return frechet_distance(self.classifier.features(pictures), self.reference)

    def score(self, digits: Digits, seed: int) -> Score:
        frechet, accuracy = self.frechet(digits.pictures), self.classifier.accuracy(digits)
        return Score(seed=seed, frechet=frechet, class_accuracy=accuracy)


def mean_frechet(scores: Sequence[Score]) -> float:
    return fmean(score.frechet for score in scores)


def mean_accuracy(scores: Sequence[Score]) -> float:
    return fmean(score.class_accuracy for score in scores)
