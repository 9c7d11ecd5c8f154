"""What networks take beside latents and t, and where it is stored: class labels, embedded prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dyexport.architectures import FluxPreset, LattePreset, Preset
from dyexport.models.base import Inputs

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
    if isinstance(preset, FluxPreset):
        return Prompts(preset)
    return Captions(preset) if isinstance(preset, LattePreset) else ClassLabels(preset.classes)


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


@dataclass(frozen=True)
class Prompts:
    """FLUX: embedded prompts (B, T, C_text) and pooled ones (B, C_pooled); positions and guidance are added."""

    preset: FluxPreset

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
        """A guidance-distilled model has no unconditional branch to train."""
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


def grid_positions(side: int, device: torch.device) -> Tensor:
    """Positions of the tokens of a square picture: (side * side, 3), the first axis unused."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float().to(device)
