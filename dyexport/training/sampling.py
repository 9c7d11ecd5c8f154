"""Sampling while a model is built: from noise to latents, with the scheduler of the model's pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyexport.backbones import get_conditioning
from dyexport.backbones.base import Inputs, Preset
from dyexport.models.conditions import Conditions
from dyexport.noise_schedule import make_scheduler

Predict = Callable[[Inputs], Tensor]
"""Function from a network's inputs to its output: (B, ...)."""


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """A network under guidance: latents (B, ...) at one t to its prediction (B, ...).

    ``unconditional`` None: without classifier-free guidance.
    """

    predict: Predict
    preset: Preset
    conditions: Conditions
    unconditional: Conditions | None
    scale: float

    def __call__(self, latents: Tensor, t: Tensor) -> Tensor:
        if self.unconditional is None or self.scale == 1:
            return self._predict(latents, t, self.conditions)
        both = {name: torch.cat([values, self.unconditional[name]]) for name, values in self.conditions.items()}
        conditional, unconditional = self._predict(torch.cat([latents, latents]), t, both).chunk(2)
        guided = unconditional + self.scale * (conditional - unconditional)  # (B, ...)
        if not self.preset.rescales_guidance:
            return guided
        return guided * conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)

    def _predict(self, latents: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        timestep = t.to(latents.device).expand(len(latents))  # (B,)
        inputs = get_conditioning(self.preset).inputs(latents, timestep, conditions)
        return self.predict(inputs)[:, : latents.shape[1]]  # without the channels of a learned sigma


def new_denoiser(
    predict: Predict,
    preset: Preset,
    conditions: Conditions,
    unconditional: Conditions | None,
    guidance: float | None,
    device: torch.device,
) -> Denoiser:
    """Return a network that samples under ``guidance``; None: the model takes none."""
    return Denoiser(
        predict=predict,
        preset=preset.with_guidance(guidance),
        conditions=_moved(conditions, device),
        unconditional=None if unconditional is None else _moved(unconditional, device),
        scale=1.0 if guidance is None else guidance,
    )


def _moved(conditions: Conditions, device: torch.device) -> Conditions:
    return {name: values.to(device) for name, values in conditions.items()}


def null_labels(preset: Preset, conditions: Conditions) -> Conditions:
    """Return the conditions of the unconditional prediction of a model of class labels."""
    count = len(next(iter(conditions.values())))
    return get_conditioning(preset).drop(conditions, torch.ones(count, dtype=torch.bool))


@torch.no_grad()
def sample_latents(
    denoise: Denoiser, steps: int, noise: Tensor, advance: Callable[[int], None] = lambda index: None
) -> Tensor:
    """Integrate from ``noise`` (B, *latent_shape) to latents of the same shape. ``advance`` is called at each step."""
    preset = denoise.preset
    scheduler = _scheduler(preset, steps)
    latents = noise
    for index, step in enumerate(scheduler.timesteps):
        advance(index)
        t = step if preset.objective == "ddpm" else scheduler.sigmas[index]
        t = 1 - t if preset.objective == "flow" else t
        output = denoise(latents, t)  # (B, *latent_shape)
        # The scheduler integrates from data to noise; the velocity of ``flow`` points from noise to data.
        direction = -output if preset.objective == "flow" else output
        latents = scheduler.step(direction, step, latents).prev_sample
    return latents


def _scheduler(preset: Preset, steps: int) -> Any:
    """Return the scheduler of the model's pipeline with its timesteps set.

    The sigmas of ``flow-sigma`` go from 1 to 1 / steps, and may be shifted by a line in the number of tokens.
    """
    scheduler = make_scheduler(preset, **preset.sampling.scheduler)
    if preset.objective != "flow-sigma":
        scheduler.set_timesteps(steps)
        return scheduler
    config = scheduler.config
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    shift = config.base_shift + slope * (preset.tokens - config.base_image_seq_len)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=shift)
    return scheduler
