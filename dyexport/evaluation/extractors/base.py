"""Contract of what looks at pictures, and its choice by name. Pictures are (B, C, H, W) with values in [0, 1]."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from dyexport.evaluation.data_sets import DIGITS, EMOJI


class FeatureExtractor(Protocol):
    """Function from pictures to features, on the device of the pictures."""

    @property
    def name(self) -> str: ...

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        """Compute features: (B, C, H, W) -> (B, d)."""


class Classifier(Protocol):
    """Function from pictures to the most likely class."""

    @property
    def name(self) -> str: ...

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        """Compute the index of the most likely class: (B, C, H, W) -> (B,)."""


def open_features(source: str) -> FeatureExtractor:
    """Open a built-in data set's, a TorchScript file, or a directory or hub id of transformers.

    Raises ``CheckpointError``, and ``DataError`` for a data set that cannot be read.
    """
    if source == DIGITS:
        from dyexport.evaluation.extractors.digits import DigitFeatures

        return DigitFeatures()
    if source == EMOJI:
        from dyexport.evaluation.extractors.emoji import EmojiFeatures

        return EmojiFeatures()
    if is_torchscript(source):
        from dyexport.evaluation.extractors.torchscript import TorchScriptFeatures

        return TorchScriptFeatures(source)
    from dyexport.evaluation.extractors.pretrained import PretrainedFeatures

    return PretrainedFeatures(source)


def open_classifier(source: str) -> Classifier:
    """Open a built-in data set's, a TorchScript file, or a directory or hub id of transformers.

    Raises ``CheckpointError``, and ``DataError`` for a data set that cannot be read.
    """
    if source == DIGITS:
        from dyexport.evaluation.extractors.digits import DigitClasses

        return DigitClasses()
    if source == EMOJI:
        from dyexport.evaluation.extractors.emoji import EmojiClasses

        return EmojiClasses()
    if is_torchscript(source):
        from dyexport.evaluation.extractors.torchscript import TorchScriptClassifier

        return TorchScriptClassifier(source)
    from dyexport.evaluation.extractors.pretrained import PretrainedClassifier

    return PretrainedClassifier(source)


def is_torchscript(source: str) -> bool:
    """Return whether a source is a file rather than a directory or a hub id."""
    return Path(source).suffix in (".pt", ".ts", ".pth") or Path(source).is_file()


def in_color(pictures: torch.Tensor) -> torch.Tensor:
    """Return pictures of three channels, for networks that take no others: (B, 1 or 3, H, W) -> (B, 3, H, W)."""
    return pictures.expand(-1, 3, -1, -1) if pictures.shape[1] == 1 else pictures


def whole(features: torch.Tensor, name: str) -> torch.Tensor:
    """Return features as (B, d), those of feature maps without their sides of 1. Raises ``CheckpointError``."""
    from dyexport.errors import CheckpointError

    if features.ndim < 2 or features.shape[1] != features[0].numel():
        shape = list(features.shape)
        raise CheckpointError(f"{name} returns shape {shape}; features must be (batch, d): use a network that pools")
    return features.flatten(1)
