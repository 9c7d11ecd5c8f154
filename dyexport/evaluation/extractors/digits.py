"""Features and classes of digits, by a classifier trained on real digits.

The classifier is a multilayer perceptron on the training split (80 %) of scikit-learn's digits, always
with the same seed; its features are the 64 activations before the last layer. Distances are to the
features of that same split, as FID's on ImageNet are to its training set.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from dyexport.digits import Digits, load_digits
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

    def classes(self, pictures: Array) -> Array:
        """Return the most likely class of each picture: (n, 1, 8, 8) -> (n,)."""
        predicted: Array = self._network.predict(_flat(pictures))
        return predicted


@cache
def trained_classifier() -> DigitClassifier:
    """Return the classifier of the training split, which is trained once."""
    return DigitClassifier(load_digits("train"))


def _flat(pictures: Array) -> Array:
    return pictures.reshape(len(pictures), -1).astype(np.float64)  # (n, 64)


class DigitFeatures:
    """Features of digits (B, 64)."""

    name = "digits"

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(trained_classifier().features(pictures.cpu().numpy()))  # (B, 64)


class DigitClasses:
    """Classes of digits."""

    name = "digits"

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(trained_classifier().classes(pictures.cpu().numpy()))  # (B,)
