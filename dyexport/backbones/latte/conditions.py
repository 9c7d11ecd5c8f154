"""Embedded captions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyexport.backbones.base import Inputs
from dyexport.backbones.latte.preset import LattePreset
from dyexport.models.conditions import Column, Conditions


@dataclass(frozen=True)
class Captions:
    """Latte: embedded prompts (B, T, C_text)."""

    preset: LattePreset

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column("prompt_embeds", "encoder_hidden_states", (None, self.preset.caption_size)),)

    def random(self, count: int, generator: torch.Generator) -> Conditions:
        shape = (count, self.preset.text_tokens, self.preset.caption_size)
        return {"encoder_hidden_states": torch.randn(shape, generator=generator)}

    def drop(self, conditions: Conditions, rows: Tensor) -> Conditions:
        """No condition is the empty prompt, which a text encoder embeds: data has some samples that are made for it."""
        return conditions

    def inputs(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Inputs:
        return {"hidden_states": latents, "timestep": timestep, **conditions}


Conditioning = Captions
