"""What networks take beside latents and t, and where it is stored: class labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dyexport.models.base import Inputs
from dyexport.presets import Preset

Conditions = dict[str, Tensor]
"""One row per sample, by the names of the stock module's arguments."""


class Batch(NamedTuple):
    """Clean samples and what they were made for."""

    latents: Tensor  # (B, *latent_shape) float32
    conditions: Conditions


class Column(NamedTuple):
    """One condition in a data file: tensor ``name`` (n, *shape) holds the network's ``argument``."""

    name: str
    argument: str
    shape: tuple[int | None, ...] = ()  # None: any length
    classes: int | None = None  # integers in [0, classes); None for floats


class Conditioning(Protocol):
    """A kind of condition: what it looks like, and how it joins latents and t."""

    @property
    def columns(self) -> tuple[Column, ...]:
        """What data files hold beside latents."""

    def random(self, count: int, generator: torch.Generator) -> Conditions:
        """Conditions of nothing in particular, for a network that is fed noise."""

    def drop(self, conditions: Conditions, rows: Tensor) -> Conditions:
        """Training for classifier-free guidance: no condition in the rows (B,) that are True."""

    def inputs(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Inputs:
        """All arguments of the stock module."""


def get_conditioning(preset: Preset) -> Conditioning:
    return ClassLabels(preset.classes)


@dataclass(frozen=True)
class ClassLabels:
    """``class_labels`` (B,); label ``classes`` means no class."""

    classes: int

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column("labels", "class_labels", classes=self.classes),)

    def random(self, count: int, generator: torch.Generator) -> Conditions:
        return {"class_labels": torch.randint(self.classes + 1, (count,), generator=generator)}

    def drop(self, conditions: Conditions, rows: Tensor) -> Conditions:
        return {"class_labels": conditions["class_labels"].masked_fill(rows, self.classes)}

    def inputs(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Inputs:
        return {"hidden_states": latents, "timestep": timestep, **conditions}
