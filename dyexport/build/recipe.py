"""What training a large model takes, told before it starts, and refused where it cannot be had."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from time import perf_counter

import torch

from dyexport.architectures import FluxPreset, Preset
from dyexport.build.settings import BuildSettings
from dyexport.errors import DyexportError
from dyexport.slicing.flops import FlopsModel

FORWARD, BACKWARD = 1, 2  # a pass back computes gradients of activations and of weights, each as dear as a forward pass
ACTIVATIONS = 40  # values of C channels that a block keeps for its backward pass, per token
LOW_RANK_SHARE = 0.014  # of the backbone's parameters, at rank 16 with 4 experts (arXiv 2504.06803, as here)
STORED = 2  # bytes of a frozen weight or an activation, in bf16
TRAINED = 16  # bytes of a trained one: itself, its gradient, two moments, in fp32


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Of a fine-tuning run: floating-point operations, bytes of device memory, bytes of data on disk."""

    synthetic_flops: float
    training_flops: float
    device_bytes: float
    data_bytes: float

    def hours(self, flops_per_second: float) -> float:
        return (self.synthetic_flops + self.training_flops) / flops_per_second / 3600


def estimate(settings: BuildSettings) -> Effort:
    """From the sizes alone: dense passes, since masks save nothing in training; +-50 %."""
    preset, pace = settings.preset, settings.finetune_schedule
    forward = 2 * FlopsModel.of_preset(preset).dense  # a multiply-add is two operations
    made = settings.sampling.samples if settings.data_source == "synthetic" else 0
    asked = (settings.sampling.steps or 0) * (2 if preset.classes else 1)  # guidance asks twice
    passes = 2 if settings.distill else 1.2  # the dynamic path, and the complete one for a share of the run
    back = BACKWARD if settings.lora is None else FORWARD  # frozen weights need no gradients
    rows = preset.tokens + preset.text_tokens
    kept = ACTIVATIONS * preset.hidden_size * rows * preset.depth * STORED
    return Effort(
        synthetic_flops=made * asked * forward,
        training_flops=pace.steps * pace.batch_size * passes * (FORWARD + back) * forward,
        device_bytes=preset.parameters * STORED + trained_parameters(settings) * TRAINED + kept,
        data_bytes=made * 4 * _sample_values(preset),
    )


def trained_parameters(settings: BuildSettings) -> float:
    """All weights, or a low-rank share of them; and FLUX's token routers, whose modulation is as large as a block's."""
    preset = settings.preset
    routers = 4 * preset.hidden_size**2 * preset.depth if isinstance(preset, FluxPreset) else 0
    return routers + preset.parameters * (1 if settings.lora is None else LOW_RANK_SHARE)


def _sample_values(preset: Preset) -> int:
    """Numbers that one sample takes: its latent, and its embedded prompt."""
    text = preset.text_tokens * preset.joint_size + preset.pooled_size if isinstance(preset, FluxPreset) else 1
    return prod(preset.latent_shape) + text


def check_training(settings: BuildSettings) -> str | None:
    """What the fine-tuning of a large model will take, in one sentence; None for any other build.

    Raises ``DyexportError`` where there is no GPU, or too small a one.
    """
    preset = settings.preset
    if settings.routers != "trained" or not settings.large:
        return None
    effort, size = estimate(settings), f"{preset.parameters / 1e9:.1f} billion parameters"
    if not torch.cuda.is_available():
        raise DyexportError(
            f"fine-tuning {preset.name} ({size}) takes a GPU and torch sees none; give --finetune-steps 0 to choose "
            "widths by importance instead, and --checkpoint DIR where the model hub cannot be reached"
        )
    free = torch.cuda.get_device_properties(0).total_memory
    if effort.device_bytes > free:
        raise DyexportError(
            f"fine-tuning {preset.name} ({size}) takes about {effort.device_bytes / 1e9:.0f} GB of GPU memory and this "
            f"GPU has {free / 1e9:.0f}; give --finetune-steps 0 to choose widths by importance instead"
        )
    speed = measured_speed(torch.device("cuda"))
    return (
        f"fine-tuning {preset.name}: about {effort.hours(speed):.0f} hours at the {speed / 1e12:.0f} TFLOP/s that this "
        f"GPU does now, {effort.device_bytes / 1e9:.0f} GB of its memory, {effort.data_bytes / 1e9:.1f} GB of data; "
        "--finetune-steps 0 skips it"
    )


def measured_speed(device: torch.device, *, size: int = 4096, seconds: float = 1.0) -> float:
    """Operations a second of (size, size) bf16 products, halved: a network keeps a GPU half as busy."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    done, begin = 0, perf_counter()
    while (spent := perf_counter() - begin) < seconds:
        torch.matmul(left, right).sum().item()  # .item() waits for the device
        done += 1
    return done * 2 * size**3 / spent / 2
