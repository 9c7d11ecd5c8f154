"""Synthetic training data: latents that the static model samples itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dyexport.backbones import get_adapter, get_conditioning
from dyexport.backbones.base import Preset
from dyexport.models.conditions import Conditions
from dyexport.stages.ledger import ProcessGroup, SingleProcess
from dyexport.training.data import ShardDirectory
from dyexport.training.randomness import step_generator
from dyexport.training.sampling import new_denoiser, null_labels, sample_latents
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
    predict = partial(get_adapter(preset.backbone).run, backbone)
    device = next(backbone.parameters()).device
    assert config.steps is not None
    for path, start in own:
        if start in done:
            continue
        stop = min(start + SHARD_SAMPLES, config.samples)
        conditions = _conditions(preset, torch.arange(start, stop), prompts, config.seed)
        generator = step_generator(config.seed, start, "noise")
        unconditional = _unconditional(preset, conditions, prompts)
        denoise = new_denoiser(predict, preset, conditions, unconditional, config.guidance, device)
        noise = torch.randn((stop - start, *preset.latent_shape), generator=generator).to(device)  # (B, *latent_shape)
        latents = sample_latents(denoise, config.steps, noise, report)
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
    if preset.classes:
        return null_labels(preset, conditions)
    if prompts is None or preset.guidance_kind != "classifier-free":
        return None
    count = len(next(iter(conditions.values())))
    return {name: values[-1:].expand(count, *values.shape[1:]) for name, values in prompts.items()}
