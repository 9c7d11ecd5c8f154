"""Embedded captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dyexport.backbones.base import Inputs
from dyexport.backbones.latte.preset import LattePreset
from dyexport.models.conditions import Column, Conditions


@dataclass(frozen=True)
class Captions:
    """Embedded prompts (B, T, C_text)."""

    preset: LattePreset
    unconditional: ClassVar[str | None] = ""

    def embed(self, pipe: Any, prompts: list[str]) -> Conditions:
        """Embed prompts to (B, T, C_text), padded with zeros as in the pipeline; longer prompts are truncated."""
        embedded, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": F.pad(embedded, (0, 0, 0, self.preset.text_tokens - embedded.shape[1]))}

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column("prompt_embeds", "encoder_hidden_states", (None, self.preset.caption_size)),)

    def random(self, count: int, generator: torch.Generator) -> Conditions:
        shape = (count, self.preset.text_tokens, self.preset.caption_size)
        return {"encoder_hidden_states": torch.randn(shape, generator=generator)}

    def drop(self, conditions: Conditions, rows: Tensor) -> Conditions:
        """Return the conditions unchanged: the null condition is the embedded empty prompt, which data contains."""
        return conditions

    def inputs(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Inputs:
        return {"hidden_states": latents, "timestep": timestep, **conditions}


Conditioning = Captions
