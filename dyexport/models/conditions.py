"""Conditions of a sample, class labels or embedded prompts, and the columns of data files that hold them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Conditions = dict[str, Tensor]
"""One row per sample, by the names of the stock module's arguments."""


GRID = "grid"
"""Condition of samples that are not of the model's own size: rows and columns of tokens, (B, 2), equal in a batch."""


def grid_of(conditions: Conditions, side: int) -> tuple[int, int]:
    """Return the rows and columns of tokens of a batch, by default ``side`` of each."""
    if GRID not in conditions:
        return side, side
    rows, columns = conditions[GRID][0].tolist()
    return rows, columns


class Batch(NamedTuple):
    """Clean samples and their conditions."""

    latents: Tensor  # (B, *latent_shape) float32
    conditions: Conditions


class Column(NamedTuple):
    """One condition in a data file: tensor ``name`` (n, *shape) holds the network's ``argument``."""

    name: str
    argument: str
    shape: tuple[int | None, ...] = ()  # None: any length
    classes: int | None = None  # integers in [0, classes); None for floats
