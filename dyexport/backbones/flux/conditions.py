"""Embedded prompts, positions and guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dyexport.backbones.base import Inputs
from dyexport.backbones.flux.preset import FluxPreset
from dyexport.models.conditions import Column, Conditions


@dataclass(frozen=True)
class Prompts:
    """Embedded prompts (B, T, C_text) and pooled prompts (B, C_pooled). ``inputs`` adds positions and guidance."""

    preset: FluxPreset
    unconditional: ClassVar[str | None] = None  # guidance is embedded

    def embed(self, pipe: Any, prompts: list[str]) -> Conditions:
        """(B, T, C_text), (B, C_pooled)."""
        embedded, pooled, _ = pipe.encode_prompt(prompts, None, max_sequence_length=self.preset.text_tokens)
        return {"encoder_hidden_states": embedded, "pooled_projections": pooled}

    @property
    def columns(self) -> tuple[Column, ...]:
        return (
            Column("prompt_embeds", "encoder_hidden_states", (None, self.preset.joint_size)),
            Column("pooled_prompt_embeds", "pooled_projections", (self.preset.pooled_size,)),
        )

    def random(self, count: int, generator: torch.Generator) -> Conditions:
        preset = self.preset
        return {
            "encoder_hidden_states": torch.randn(count, preset.text_tokens, preset.joint_size, generator=generator),
            "pooled_projections": torch.randn(count, preset.pooled_size, generator=generator),
        }

    def drop(self, conditions: Conditions, rows: Tensor) -> Conditions:
        """Return the conditions unchanged: a guidance-distilled model has no unconditional branch to train."""
        return conditions

    def inputs(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Inputs:
        device = latents.device
        text_tokens = conditions["encoder_hidden_states"].shape[1]
        inputs = {
            "hidden_states": latents,  # (B, N, C)
            "timestep": timestep,
            **conditions,
            "img_ids": grid_positions(self.preset.side, device),  # (N, 3)
            "txt_ids": torch.zeros(text_tokens, 3, device=device),  # (T, 3)
        }
        if self.preset.guidance is not None:
            inputs["guidance"] = torch.full_like(timestep, self.preset.guidance)  # (B,)
        return inputs


def grid_positions(side: int, device: torch.device) -> Tensor:
    """Compute the positions of a square picture's tokens: (side * side, 3), the first axis unused."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float().to(device)


Conditioning = Prompts
