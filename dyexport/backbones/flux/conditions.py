"""Embedded prompts, positions and guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dyexport.backbones.base import Inputs
from dyexport.backbones.flux.preset import FluxPreset
from dyexport.models.conditions import GRID, Column, Conditions, grid_of

CONTEXT = "context"  # a masked picture and its mask, or a control picture, as packed latents


@dataclass(frozen=True)
class Prompts:
    """Embedded prompts (B, T, C_text) and pooled prompts (B, C_pooled). ``inputs`` adds positions and guidance.

    A model that edits pictures has a context (B, N, C_context) too, whose channels follow those of the latents.
    """

    preset: FluxPreset
    unconditional: ClassVar[str | None] = None  # guidance is embedded

    def embed(self, pipe: Any, prompts: list[str]) -> Conditions:
        """Embed prompts to text tokens (B, T, C_text) and pooled text (B, C_pooled)."""
        embedded, pooled, _ = pipe.encode_prompt(prompts, None, max_sequence_length=self.preset.text_tokens)
        return {"encoder_hidden_states": embedded, "pooled_projections": pooled}

    @property
    def columns(self) -> tuple[Column, ...]:
        preset = self.preset
        context = Column(CONTEXT, CONTEXT, (preset.tokens, preset.context_channels))
        return (
            Column("prompt_embeds", "encoder_hidden_states", (None, preset.joint_size)),
            Column("pooled_prompt_embeds", "pooled_projections", (preset.pooled_size,)),
            *((context,) if preset.context_channels else ()),
        )

    def random(self, count: int, generator: torch.Generator) -> Conditions:
        preset = self.preset
        conditions = {
            "encoder_hidden_states": torch.randn(count, preset.text_tokens, preset.joint_size, generator=generator),
            "pooled_projections": torch.randn(count, preset.pooled_size, generator=generator),
        }
        if preset.context_channels:
            conditions[CONTEXT] = torch.randn(count, preset.tokens, preset.context_channels, generator=generator)
        return conditions

    def drop(self, conditions: Conditions, rows: Tensor) -> Conditions:
        """Return the conditions unchanged: a guidance-distilled model has no unconditional branch to train."""
        return conditions

    def inputs(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Inputs:
        device = latents.device
        text_tokens = conditions["encoder_hidden_states"].shape[1]
        arguments = {name: values for name, values in conditions.items() if name not in (CONTEXT, GRID)}
        context = [conditions[CONTEXT]] if CONTEXT in conditions else []  # (B, N, C_context)
        inputs = {
            "hidden_states": torch.cat([latents, *context], dim=2),  # (B, N, C_in)
            "timestep": timestep,
            **arguments,
            "img_ids": grid_positions(*grid_of(conditions, self.preset.side), device),  # (N, 3)
            "txt_ids": torch.zeros(text_tokens, 3, device=device),  # (T, 3)
        }
        if self.preset.guidance is not None:
            inputs["guidance"] = torch.full_like(timestep, self.preset.guidance)  # (B,)
        return inputs


def grid_positions(height: int, width: int, device: torch.device) -> Tensor:
    """Compute the positions of a picture's tokens: (height * width, 3), the first axis unused."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float().to(device)


Conditioning = Prompts
