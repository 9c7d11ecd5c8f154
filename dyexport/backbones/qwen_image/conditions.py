"""Embedded prompts of different lengths, and the shape of the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dyexport.backbones.base import Inputs
from dyexport.backbones.qwen_image.preset import UNCONDITIONAL, QwenImagePreset
from dyexport.models.conditions import GRID, Column, Conditions, grid_of


@dataclass(frozen=True)
class Prompts:
    """Embedded prompts (B, T, J), zero where a prompt has ended, and their masks (B, T): 1 for a token, 0 after."""

    preset: QwenImagePreset
    unconditional: ClassVar[str | None] = UNCONDITIONAL

    def embed(self, pipe: Any, prompts: list[str]) -> Conditions:
        """Return (B, T, J), padded to the preset's length; longer prompts are cut."""
        words = self.preset.text_tokens
        text, mask = pipe.encode_prompt(prompts, max_sequence_length=words)
        mask = (
            torch.ones(text.shape[:2]) if mask is None else mask
        )  # the pipeline leaves it out where nothing is padded
        missing = words - text.shape[1]
        return {
            "encoder_hidden_states": F.pad(text, (0, 0, 0, missing)),
            "encoder_hidden_states_mask": F.pad(mask.float(), (0, missing)),
        }

    @property
    def columns(self) -> tuple[Column, ...]:
        return (
            Column("prompt_embeds", "encoder_hidden_states", (None, self.preset.joint_size)),
            Column("prompt_embeds_mask", "encoder_hidden_states_mask", (None,)),
        )

    def random(self, count: int, generator: torch.Generator) -> Conditions:
        """Return random prompts of random lengths."""
        words = self.preset.text_tokens
        lengths = torch.randint(1, words + 1, (count, 1), generator=generator)
        mask = (torch.arange(words) < lengths).float()  # (B, T)
        text = torch.randn(count, words, self.preset.joint_size, generator=generator)  # (B, T, J)
        return {"encoder_hidden_states": text * mask.unsqueeze(2), "encoder_hidden_states_mask": mask}

    def drop(self, conditions: Conditions, rows: Tensor) -> Conditions:
        """Return conditions unchanged. An empty prompt is the dropped condition, and the data has samples of it."""
        return conditions

    def inputs(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Inputs:
        height, width = grid_of(conditions, self.preset.side)
        return {
            "hidden_states": latents,  # (B, N, C)
            "timestep": timestep,
            **{name: values for name, values in conditions.items() if name != GRID},
            "encoder_hidden_states_mask": conditions["encoder_hidden_states_mask"].ne(0).float(),  # (B, T)
            "img_shapes": torch.tensor([1, height, width], device=latents.device),  # (3,)
        }


Conditioning = Prompts
