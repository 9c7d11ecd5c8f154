"""Synthetic training data: latents that the static model samples itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dyexport.backbones import get_adapter, get_conditioning
from dyexport.backbones.base import Preset
from dyexport.models.conditions import Conditions
from dyexport.noise_schedule import make_scheduler
from dyexport.stages.ledger import ProcessGroup, SingleProcess
from dyexport.training.data import ShardDirectory
from dyexport.training.randomness import step_generator
from dyexport.training.state import ORIGIN, fingerprint, origin_of, write_tensors
from dyexport.training.synthetic_config import SyntheticConfig

SHARD_SAMPLES = 64

SamplingProgress = Callable[[int, int, str], None]
"""Called with denoising steps done, steps in total, and a text with the number of samples done."""


def generate(
    backbone: nn.Module,
    preset: Preset,
    config: SyntheticConfig,
    directory: Path,
    progress: SamplingProgress | None = None,
    *,
    prompts: Conditions | None = None,
    group: ProcessGroup | None = None,
) -> ShardDirectory:
    """Sample latents into safetensors shards and open them.

    Samples cycle through the class labels, or through embedded ``prompts``, of which the last one is the unconditional
    prompt where guidance is classifier-free. Without ``prompts`` their embeddings are random. Shards that exist and
    were made by the same weights and settings are kept, so a killed run continues where it stopped. The processes of a
    group take turns with the shards and return when all are done; each reports its own.
    """
    backbone, config, group = backbone.eval(), config.resolved(preset), group or SingleProcess()
    origin = _digest(backbone, preset, config, prompts)
    starts = {
        directory / f"synthetic-{start:08d}.safetensors": start for start in range(0, config.samples, SHARD_SAMPLES)
    }
    for path in set(directory.glob("synthetic-*.safetensors")) - set(starts) if group.is_main_process else ():
        path.unlink()
    own = list(starts.items())[group.index :: group.count]
    done = [start for path, start in own if origin_of(path) == origin]
    report = partial(_report, progress, config, [start for _, start in own], done)
    for path, start in own:
        if start in done:
            continue
        stop = min(start + SHARD_SAMPLES, config.samples)
        conditions = _conditions(preset, torch.arange(start, stop), prompts, config.seed)
        generator = step_generator(config.seed, start, "noise")
        denoise = _denoiser(backbone, preset, conditions, prompts, config.guidance)
        latents = _sample(denoise, config, generator, report)
        stored = {column.name: conditions[column.argument] for column in get_conditioning(preset).columns}
        write_tensors(path, {"latents": latents.cpu(), **stored}, {ORIGIN: origin})
        done.append(start)
    report(0)
    group.broadcast("sampled")
    return ShardDirectory(directory, preset)


def _report(
    progress: SamplingProgress | None, config: SyntheticConfig, own: Sequence[int], done: Sequence[int], step: int
) -> None:
    """Report finished shards, by the samples that they begin at, and the steps of the next one."""
    if progress is not None:
        assert config.steps is not None
        made, total = (sum(min(SHARD_SAMPLES, config.samples - start) for start in starts) for starts in (done, own))
        progress(len(done) * config.steps + step, len(own) * config.steps, f"{made} of {total} samples")


def _digest(backbone: nn.Module, preset: Preset, config: SyntheticConfig, prompts: Conditions | None) -> str:
    """Hash everything that the samples depend on."""
    digest = hashlib.sha256(f"{preset.name} {config} {fingerprint(backbone)}".encode())
    for name, values in sorted((prompts or {}).items()):
        digest.update(f"{name} {tuple(values.shape)}".encode())
        digest.update(values.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _conditions(preset: Preset, rows: Tensor, prompts: Conditions | None, seed: int) -> Conditions:
    """Return the conditions of samples ``rows`` (B,)."""
    if preset.classes:
        return {"class_labels": rows % preset.classes}
    conditioning = get_conditioning(preset)
    embedded = {name: values[rows % len(values)] for name, values in (prompts or {}).items()}
    if embedded.keys() == {column.argument for column in conditioning.columns}:
        return embedded
    return {**conditioning.random(len(rows), step_generator(seed, int(rows[0]), "data")), **embedded}


def _unconditional(preset: Preset, conditions: Conditions, prompts: Conditions | None) -> Conditions | None:
    """Return the conditions of the unconditional predictions of classifier-free guidance; None where there are none.

    Random embeddings have no unconditional counterpart.
    """
    count = len(next(iter(conditions.values())))
    if preset.classes:
        return get_conditioning(preset).drop(conditions, torch.ones(count, dtype=torch.bool))
    if prompts is None or preset.guidance_kind != "classifier-free":
        return None
    return {name: values[-1:].expand(count, *values.shape[1:]) for name, values in prompts.items()}


def _denoiser(
    backbone: nn.Module, preset: Preset, conditions: Conditions, prompts: Conditions | None, guidance: float | None
) -> _Denoiser:
    device = next(backbone.parameters()).device
    unconditional = _unconditional(preset, conditions, prompts)
    return _Denoiser(
        backbone=backbone,
        preset=preset.with_guidance(guidance),
        conditions=_moved(conditions, device),
        unconditional=None if unconditional is None else _moved(unconditional, device),
        scale=1.0 if guidance is None else guidance,
    )


def _moved(conditions: Conditions, device: torch.device) -> Conditions:
    return {name: values.to(device) for name, values in conditions.items()}


@dataclass(frozen=True, kw_only=True)
class _Denoiser:
    """The static model under guidance: latents (B, ...) at one t to its prediction (B, ...).

    ``unconditional`` None: without classifier-free guidance.
    """

    backbone: nn.Module
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
        output = get_adapter(self.preset.backbone).run(self.backbone, inputs)
        return output[:, : latents.shape[1]]  # without the channels of a learned sigma


@torch.no_grad()
def _sample(
    denoise: _Denoiser, config: SyntheticConfig, generator: torch.Generator, advance: Callable[[int], None]
) -> Tensor:
    """Integrate from noise to latents: (B, *latent_shape)."""
    assert config.steps is not None
    preset, conditions = denoise.preset, denoise.conditions
    scheduler = _scheduler(preset, config.steps)
    first = next(iter(conditions.values()))
    shape = (len(first), *preset.latent_shape)
    latents = torch.randn(shape, generator=generator).to(first.device)  # (B, *latent_shape)
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
