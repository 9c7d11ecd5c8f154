"""Class labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyexport.backbones.base import Inputs
from dyexport.backbones.dit.preset import DiTPreset
from dyexport.models.conditions import Column, Conditions


@dataclass(frozen=True)
class ClassLabels:
    """``class_labels`` (B,); label ``classes`` is the null class."""

    preset: DiTPreset

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column("labels", "class_labels", classes=self.preset.classes),)

    def random(self, count: int, generator: torch.Generator) -> Conditions:
        return {"class_labels": torch.randint(self.preset.classes + 1, (count,), generator=generator)}

    def drop(self, conditions: Conditions, rows: Tensor) -> Conditions:
        return {"class_labels": conditions["class_labels"].masked_fill(rows, self.preset.classes)}

    def inputs(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Inputs:
        return {"hidden_states": latents, "timestep": timestep, **conditions}


Conditioning = ClassLabels
