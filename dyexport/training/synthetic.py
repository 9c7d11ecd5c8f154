"""Training data for people with no data: latents that the static model samples itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dyexport.architectures import FluxPreset, Preset
from dyexport.errors import UsageError
from dyexport.models.base import get_adapter
from dyexport.models.conditioning import Conditions, get_conditioning
from dyexport.models.inputs import DDPM_BETAS, DDPM_STEPS
from dyexport.training.data import ShardDirectory
from dyexport.training.draws import step_generator
from dyexport.training.state import fingerprint, write_tensors

SHARD_SAMPLES = 64


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """``guidance`` is the scale of classifier-free guidance, of models with classes; 1 turns it off."""

    samples: int = 4096
    steps: int = 50
    guidance: float = 1.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or not 1 <= self.steps <= DDPM_STEPS:
            raise UsageError(
                f"{self.samples} samples of {self.steps} steps; give at least 1 sample, and 1 to {DDPM_STEPS} steps"
            )


def generate(
    backbone: nn.Module,
    preset: Preset,
    config: SyntheticConfig,
    directory: Path,
    progress: Callable[[int, int], None] | None = None,
    *,
    prompts: Conditions | None = None,
) -> ShardDirectory:
    """Sample latents into safetensors shards and open them; ``progress`` gets samples done and samples in all.

    Class labels take turns, and so do embedded ``prompts``; without any these are random.
    Shards already there, made by the same weights and settings, are kept: a killed run goes on where it stopped.
    """
    backbone = backbone.eval()
    origin = _digest(backbone, preset, config, prompts)
    wanted = {
        directory / f"synthetic-{start:08d}.safetensors": start for start in range(0, config.samples, SHARD_SAMPLES)
    }
    for path in set(directory.glob("synthetic-*.safetensors")) - set(wanted):
        path.unlink()
    for path, start in wanted.items():
        stop = min(start + SHARD_SAMPLES, config.samples)
        if _origin(path) != origin:
            conditions = _conditions(preset, torch.arange(start, stop), prompts, config.seed)
            latents = _sample(backbone, preset, conditions, config, step_generator(config.seed, start, "noise"))
            stored = {column.name: conditions[column.argument] for column in get_conditioning(preset).columns}
            write_tensors(path, {"latents": latents.cpu(), **stored}, {"origin": origin})
        if progress is not None:
            progress(stop, config.samples)
    return ShardDirectory(directory, preset)


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


def _origin(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("origin")
    except (OSError, SafetensorError):
        return None


@torch.no_grad()
def _sample(
    backbone: nn.Module, preset: Preset, conditions: Conditions, config: SyntheticConfig, generator: torch.Generator
) -> Tensor:
    """From noise to latents: (B, *latent_shape)."""
    scheduler = _scheduler(preset, config.steps)
    device = next(backbone.parameters()).device
    conditions = {name: values.to(device) for name, values in conditions.items()}
    shape = (len(next(iter(conditions.values()))), *preset.latent_shape)
    latents = torch.randn(shape, generator=generator).to(device)  # (B, *latent_shape)
    denoise = _guided if preset.classes else _predict
    for index, step in enumerate(scheduler.timesteps):
        t = step if preset.objective == "ddpm" else scheduler.sigmas[index]
        t = 1 - t if preset.objective == "flow" else t
        output = denoise(backbone, preset, latents, t, conditions, config.guidance)  # (B, *latent_shape)
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


def _predict(
    backbone: nn.Module, preset: Preset, latents: Tensor, t: Tensor, conditions: Conditions, scale: float
) -> Tensor:
    """One forward pass without guidance; channels of a learned sigma are dropped."""
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
