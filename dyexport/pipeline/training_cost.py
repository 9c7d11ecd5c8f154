"""What training a large model takes, told before it starts, and refused where it cannot be had."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from time import perf_counter
from typing import Any

import torch

from dyexport.backbones import get_conditioning
from dyexport.backbones.base import Preset
from dyexport.errors import DyexportError
from dyexport.flops import FlopsModel
from dyexport.pipeline.settings import BuildSettings
from dyexport.pipeline.stages import count_trainable
from dyexport.training.accelerating import check_accelerate

FORWARD, BACKWARD = 1, 2  # a pass back computes gradients of activations and of weights, each as dear as a forward pass
ACTIVATIONS = 40  # values of C channels that a block keeps for its backward pass, per token; 26 to 31 were counted
WEIGHT = 4  # bytes of a frozen weight, in fp32
TRAINED = 20  # bytes of a trained one: itself, its gradient, two moments, its average, in fp32


@dataclass(frozen=True, kw_only=True)
class TrainingCost:
    """Of a fine-tuning run: floating-point operations, bytes of device memory, bytes of data on disk."""

    synthetic_flops: float
    training_flops: float
    device_bytes: float
    data_bytes: float

    def hours(self, flops_per_second: float) -> float:
        return (self.synthetic_flops + self.training_flops) / flops_per_second / 3600


def estimate(settings: BuildSettings, *, processes: int = 1, precision: str = "no") -> TrainingCost:
    """From the sizes alone: dense passes, since masks save nothing in training; +-50 %.

    ``processes`` share a batch, each with its own GPU; ``precision`` is accelerate's mixed one, of activations.
    """
    preset, pace = settings.preset, settings.finetune_schedule
    forward = 2 * FlopsModel.of_preset(preset).dense  # a multiply-add is two operations
    made = settings.sampling.samples if settings.data_source == "synthetic" else 0
    asked = (settings.sampling.steps or 0) * (2 if preset.classes else 1)  # guidance asks twice
    passes = 2 if settings.distill else 1.2  # the dynamic path, and the complete one for a share of the run
    back = BACKWARD if settings.lora is None else FORWARD  # frozen weights need no gradients
    rows = preset.tokens + preset.text_tokens
    trained = count_trainable(settings)["trainable_parameters"]
    samples = pace.batch_size / processes  # of a batch, on one GPU
    kept = samples * ACTIVATIONS * preset.hidden_size * rows * preset.depth * (4 if precision == "no" else 2)
    return TrainingCost(
        synthetic_flops=made * asked * forward,
        training_flops=pace.steps * pace.batch_size * passes * (FORWARD + back) * forward,
        device_bytes=preset.parameters * WEIGHT + trained * TRAINED + kept,
        data_bytes=made * 4 * _sample_values(preset),
    )


def _sample_values(preset: Preset) -> int:
    """Numbers that one sample takes: its latent, and what it was made for."""
    conditions = (column.shape for column in get_conditioning(preset).columns)
    return prod(preset.latent_shape) + sum(
        prod(preset.text_tokens if size is None else size for size in shape) for shape in conditions
    )


def check_training(settings: BuildSettings) -> str | None:
    """What the fine-tuning of a large model will take, in one sentence; None for any other build.

    Raises ``DyexportError`` where there is no GPU, or too little of one is free, and ``UsageError`` for what accelerate
    is set to and training cannot do.
    """
    preset = settings.preset
    if settings.routers == "trained" or settings.from_scratch:
        check_accelerate()
    if settings.routers != "trained" or not settings.large:
        return None
    effort, size = estimate(settings, **launched()), f"{preset.parameters / 1e9:.1f} billion parameters"
    if not torch.cuda.is_available():
        raise DyexportError(
            f"fine-tuning {preset.name} ({size}) takes a GPU and torch sees none; give --finetune-steps 0 to choose "
            "widths by importance instead, and --checkpoint DIR where the model hub cannot be reached"
        )
    check_fits(settings, effort, *torch.cuda.mem_get_info())
    speed = measured_speed(torch.device("cuda"))
    return (
        f"fine-tuning {preset.name}: about {effort.hours(speed):.0f} hours at the {speed / 1e12:.0f} TFLOP/s that this "
        f"GPU does now, {effort.device_bytes / 1e9:.0f} GB of its memory, {effort.data_bytes / 1e9:.1f} GB of data; "
        "--finetune-steps 0 skips it"
    )


def launched(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Settings of `accelerate launch` that memory depends on."""
    return {
        "processes": int(environment.get("WORLD_SIZE", "1")),
        "precision": environment.get("ACCELERATE_MIXED_PRECISION", "no"),
    }


def check_fits(settings: BuildSettings, effort: TrainingCost, free: int, whole: int) -> None:
    """Raise ``DyexportError`` where a run takes more than the ``free`` bytes of a GPU that has ``whole``."""
    if effort.device_bytes <= free:
        return
    instead = "give --finetune-steps 0 to choose widths by importance instead"
    count = settings.finetune_schedule.batch_size
    if estimate(settings, processes=count, precision="bf16").device_bytes <= whole:
        instead = (
            f"`accelerate launch --mixed_precision bf16` on up to {count} GPUs shares a batch among them, or {instead}"
        )
    if effort.device_bytes <= whole:
        instead = f"end what takes the rest of its {whole / 1e9:.0f} GB, or {instead}"
    raise DyexportError(
        f"fine-tuning {settings.model} ({settings.preset.parameters / 1e9:.1f} billion parameters) takes about "
        f"{effort.device_bytes / 1e9:.0f} GB of GPU memory and this GPU has {free / 1e9:.0f} free; {instead}"
    )


def measured_speed(device: torch.device, *, size: int = 4096, seconds: float = 1.0) -> float:
    """Operations a second of (size, size) bf16 products, halved: a network keeps a GPU half as busy."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    done, begin = 0, perf_counter()
    while (spent := perf_counter() - begin) < seconds:
        torch.matmul(left, right).sum().item()  # .item() waits for the device
        done += 1
    return done * 2 * size**3 / spent / 2
