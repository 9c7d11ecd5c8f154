"""Training data for people with no data: latents that the static model samples itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from dyexport.backbones import get_adapter, get_conditioning
from dyexport.backbones.base import Preset
from dyexport.backbones.flux.preset import FluxPreset
from dyexport.models.conditions import Conditions
from dyexport.models.inputs import DDPM_BETAS, DDPM_STEPS
from dyexport.training.data import ShardDirectory
from dyexport.training.draws import step_generator
from dyexport.training.state import ORIGIN, fingerprint, origin_of, write_tensors
from dyexport.training.synthetic_config import SyntheticConfig

SHARD_SAMPLES = 64

Progress = Callable[[int, int, str], None]
"""Called with denoising steps done, steps in all, and how many samples are done."""


def generate(
    backbone: nn.Module,
    preset: Preset,
    config: SyntheticConfig,
    directory: Path,
    progress: Progress | None = None,
    *,
    prompts: Conditions | None = None,
) -> ShardDirectory:
    """Sample latents into safetensors shards and open them; ``progress`` gets denoising steps done, of how many.

    Class labels take turns, and so do embedded ``prompts``; without any these are random.
    Shards already there, made by the same weights and settings, are kept: a killed run goes on where it stopped.
    """
    backbone, config = backbone.eval(), config.resolved(preset)
    origin = _digest(backbone, preset, config, prompts)
    wanted = {
        directory / f"synthetic-{start:08d}.safetensors": start for start in range(0, config.samples, SHARD_SAMPLES)
    }
    for path in set(directory.glob("synthetic-*.safetensors")) - set(wanted):
        path.unlink()
    missing = {path: start for path, start in wanted.items() if origin_of(path) != origin}
    for index, (path, start) in enumerate(missing.items(), start=len(wanted) - len(missing)):
        advance = partial(_advance, progress, index, len(wanted), config)
        stop = min(start + SHARD_SAMPLES, config.samples)
        conditions = _conditions(preset, torch.arange(start, stop), prompts, config.seed)
        generator = step_generator(config.seed, start, "noise")
        latents = _sample(backbone, preset, conditions, config, generator, advance)
        stored = {column.name: conditions[column.argument] for column in get_conditioning(preset).columns}
        write_tensors(path, {"latents": latents.cpu(), **stored}, {ORIGIN: origin})
    _advance(progress, len(wanted), len(wanted), config, 0)
    return ShardDirectory(directory, preset)


def _advance(progress: Progress | None, shards: int, of: int, config: SyntheticConfig, step: int) -> None:
    """Report ``shards`` and the steps of the one after them."""
    if progress is not None:
        assert config.steps is not None
        made = min(shards * SHARD_SAMPLES, config.samples)
        progress(shards * config.steps + step, of * config.steps, f"{made} of {config.samples} samples")


def _digest(backbone: nn.Module, preset: Preset, config: SyntheticConfig, prompts: Conditions | None) -> str:
    """Identifies what is sampled."""
    digest = hashlib.sha256(f"{preset.name} {config} {fingerprint(backbone)}".encode())
    for name, values in sorted((prompts or {}).items()):
        digest.update(f"{name} {tuple(values.shape)}".encode())
        digest.update(values.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _conditions(preset: Preset, rows: Tensor, prompts: Conditions | None, seed: int) -> Conditions:
    """What samples ``rows`` (B,) are made for."""
    if preset.classes:
        return {"class_labels": rows % preset.classes}
    if prompts is None:
        return get_conditioning(preset).random(len(rows), step_generator(seed, int(rows[0]), "data"))
    return {name: values[rows % len(values)] for name, values in prompts.items()}


@torch.no_grad()
def _sample(
    backbone: nn.Module,
    preset: Preset,
    conditions: Conditions,
    config: SyntheticConfig,
    generator: torch.Generator,
    advance: Callable[[int], None],
) -> Tensor:
    """From noise to latents: (B, *latent_shape)."""
    assert config.steps is not None
    scheduler = _scheduler(preset, config.steps)
    device = next(backbone.parameters()).device
    conditions = {name: values.to(device) for name, values in conditions.items()}
    shape = (len(next(iter(conditions.values()))), *preset.latent_shape)
    latents = torch.randn(shape, generator=generator).to(device)  # (B, *latent_shape)
    for index, step in enumerate(scheduler.timesteps):
        advance(index)
        t = step if preset.objective == "ddpm" else scheduler.sigmas[index]
        t = 1 - t if preset.objective == "flow" else t
        output = _denoise(backbone, preset, latents, t, conditions, config.guidance)  # (B, *latent_shape)
        # The scheduler integrates from data to noise; SiT's velocity points from noise to data.
        direction = -output if preset.objective == "flow" else output
        latents = scheduler.step(direction, step, latents).prev_sample
    return latents


def _scheduler(preset: Preset, steps: int) -> Any:
    if preset.objective != "ddpm":
        return _flow_scheduler(preset, steps)
    start, end = DDPM_BETAS
    clip = preset.pixel_space
    scheduler = DDIMScheduler(DDPM_STEPS, beta_start=start, beta_end=end, beta_schedule="linear", clip_sample=clip)
    scheduler.set_timesteps(steps)
    return scheduler


def _flow_scheduler(preset: Preset, steps: int) -> FlowMatchEulerDiscreteScheduler:
    """FLUX's sigmas start at 1 and end at 1 / steps, and are shifted by a line in the number of tokens."""
    if not isinstance(preset, FluxPreset):
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(steps)
        return scheduler
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=preset.shifted)
    shift = 0.5 + (1.15 - 0.5) * (preset.tokens - 256) / (4096 - 256)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=shift)
    return scheduler


def _denoise(
    backbone: nn.Module, preset: Preset, latents: Tensor, t: Tensor, conditions: Conditions, guidance: float | None
) -> Tensor:
    """One step's output under ``guidance``; channels of a learned sigma are dropped."""
    if preset.classes:
        assert guidance is not None
        return _guided(backbone, preset, latents, t, conditions, guidance)
    if isinstance(preset, FluxPreset):
        preset = replace(preset, guidance=guidance)
    timestep = t.to(latents.device).expand(len(latents))  # (B,)
    inputs = get_conditioning(preset).inputs(latents, timestep, conditions)
    return get_adapter(preset.backbone).run(backbone, inputs)[:, : latents.shape[1]]


def _guided(
    backbone: nn.Module, preset: Preset, latents: Tensor, t: Tensor, conditions: Conditions, scale: float
) -> Tensor:
    """Classifier-free guidance in one forward pass; channels of a learned sigma are dropped."""
    conditioning = get_conditioning(preset)
    everything = torch.ones(len(latents), dtype=torch.bool, device=latents.device)  # (B,)
    dropped = conditioning.drop(conditions, everything)
    both = {name: torch.cat([values, dropped[name]]) for name, values in conditions.items()}
    doubled = torch.cat([latents, latents])  # (2B, C, H, W)
    timestep = t.to(latents.device).expand(len(doubled))
    output = get_adapter(preset.backbone).run(backbone, conditioning.inputs(doubled, timestep, both))
    labelled, unlabelled = output[:, : latents.shape[1]].chunk(2)
    return unlabelled + scale * (labelled - unlabelled)  # (B, C, H, W)
