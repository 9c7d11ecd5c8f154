"""scikit-learn's handwritten digits, the data set of the digits models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from dyexport.errors import MissingDependencyError

if TYPE_CHECKING:
    from dyexport.backbones.base import Preset
    from dyexport.bundle.spec import ModelSpec

Split = Literal["train", "held-out"]

SHAPE = (1, 8, 8)
HELD_OUT_SHARE = 0.2


@dataclass(frozen=True)
class Digits:
    """Pictures (n, 1, 8, 8) with values in [0, 1], and their classes (n,)."""

    pictures: np.ndarray
    labels: np.ndarray


def samples_digits(model: Preset | ModelSpec) -> bool:
    """Return whether the samples of a model are pictures of this size."""
    return model.pixel_space and model.latent_shape == SHAPE


def load_digits(split: Split) -> Digits:
    """Return one part of the 1,797 pictures, which are split 80/20 in a fixed way.

    Raises ``MissingDependencyError`` without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits as fetch
    except ImportError as error:
        raise MissingDependencyError("scikit-learn", "demo") from error
    data = fetch()
    order = np.random.default_rng(0).permutation(len(data.target))
    held_out = round(HELD_OUT_SHARE * len(order))
    rows = order[:held_out] if split == "held-out" else order[held_out:]
    return Digits((data.images[rows][:, None] / 16).astype(np.float32), data.target[rows].astype(np.int64))
