"""Estimates of the time and memory of fine-tuning, and a check that the GPU is large enough."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from time import perf_counter
from typing import Any

import torch

from dyexport.backbones import get_adapter, get_conditioning
from dyexport.backbones.base import Preset, RouterKind
from dyexport.backbones.recipe import Schedule
from dyexport.bundle.spec import TokenRouterKind
from dyexport.errors import DyexportError
from dyexport.flops import FlopsModel
from dyexport.lora import LoraSpec
from dyexport.models.dynamic import DynamicTransformer
from dyexport.training.synthetic_config import SyntheticConfig

FORWARD, BACKWARD = 1, 2  # a backward pass computes gradients of activations and of weights: two forward passes
ACTIVATIONS = 40  # values of C channels that a block keeps for its backward pass, per token; 26 to 31 were counted
WEIGHT = 4  # bytes of a frozen weight, in fp32
TRAINED = 20  # bytes of a trained weight, in fp32: itself, its gradient, two moments, its average


@dataclass(frozen=True, kw_only=True)
class FinetuningRun:
    """Settings of a fine-tuning run that its cost depends on.

    ``token_router`` is the kind of its token routers; None: that of new models. ``synthetic`` says how its data are
    sampled first; None: the data exist.
    """

    preset: Preset
    schedule: Schedule
    router: RouterKind = "free"
    token_router: TokenRouterKind | None = None
    td_lora: LoraSpec | None = None
    distill: bool = False
    synthetic: SyntheticConfig | None = None

    @property
    def size(self) -> str:
        return f"{self.preset.parameters / 1e9:.1f} billion parameters"


@dataclass(frozen=True, kw_only=True)
class TrainingCost:
    """Floating-point operations, bytes of device memory and bytes of data on disk of a fine-tuning run."""

    synthetic_flops: float
    training_flops: float
    device_bytes: float
    data_bytes: float

    def hours(self, flops_per_second: float) -> float:
        return (self.synthetic_flops + self.training_flops) / flops_per_second / 3600


def count_trainable(run: FinetuningRun) -> dict[str, float]:
    """Count the parameters that a run trains, and their share of what full fine-tuning trains."""
    adapter = get_adapter(run.preset.backbone)
    with torch.device("meta"):
        backbone = adapter.build(run.preset.transformer_config())
        model = DynamicTransformer(
            backbone,
            adapter,
            heads=run.preset.heads,
            tokens=True,
            router=run.router,
            td_lora=run.td_lora,
            token_router=run.token_router,
        )
    trained, full = (
        sum(parameter.numel() for parameter in (*parameters, *model.routers.parameters()))
        for parameters in (model.trainable, backbone.parameters())
    )
    return {"trainable_parameters": trained, "trainable_share": trained / full}


def estimate(run: FinetuningRun, *, processes: int = 1, precision: str = "no") -> TrainingCost:
    """Estimate a run from its sizes, to within 50 %. Masks save nothing in training, so every pass is dense.

    ``processes`` share a batch, one GPU each; ``precision`` is accelerate's mixed precision.
    """
    preset, schedule, synthetic = run.preset, run.schedule, run.synthetic
    forward = 2 * FlopsModel.of_preset(preset).dense  # a multiply-add is two operations
    samples, steps = (0, 0) if synthetic is None else (synthetic.samples, synthetic.steps or 0)
    passes_per_step = 2 if preset.guidance_kind == "classifier-free" else 1
    passes = 2 if run.distill else 1.2  # the dynamic path, and the complete model for a share of the run
    backward = BACKWARD if run.td_lora is None else FORWARD  # frozen weights need no gradients
    tokens = preset.tokens + preset.text_tokens
    trained = count_trainable(run)["trainable_parameters"]
    value_bytes = 4 if precision == "no" else 2
    local_batch = schedule.batch_size / processes
    activations = local_batch * ACTIVATIONS * preset.hidden_size * tokens * preset.depth * value_bytes
    return TrainingCost(
        synthetic_flops=samples * steps * passes_per_step * forward,
        training_flops=schedule.steps * schedule.batch_size * passes * (FORWARD + backward) * forward,
        device_bytes=preset.parameters * WEIGHT + trained * TRAINED + activations,
        data_bytes=samples * 4 * _values_per_sample(preset),
    )


def _values_per_sample(preset: Preset) -> int:
    """Count the numbers of one sample: its latent and its conditions."""
    conditions = (column.shape for column in get_conditioning(preset).columns)
    return prod(preset.latent_shape) + sum(
        prod(preset.text_tokens if size is None else size for size in shape) for shape in conditions
    )


def check_gpu(run: FinetuningRun) -> str:
    """Describe in one sentence what a run takes. Raises ``DyexportError`` without a GPU with enough free memory."""
    cost = estimate(run, **launch_settings())
    if not torch.cuda.is_available():
        raise DyexportError(
            f"fine-tuning {run.preset.name} ({run.size}) takes a GPU and torch sees none; give --finetune-steps 0 to "
            "choose widths by importance instead, and --checkpoint DIR where the model hub cannot be reached"
        )
    check_fits(run, cost, *torch.cuda.mem_get_info())
    speed = measured_speed(torch.device("cuda"))
    return (
        f"fine-tuning {run.preset.name}: about {cost.hours(speed):.0f} hours at the {speed / 1e12:.0f} TFLOP/s that "
        f"this GPU does now, {cost.device_bytes / 1e9:.0f} GB of its memory, {cost.data_bytes / 1e9:.1f} GB of data; "
        "--finetune-steps 0 skips it"
    )


def launch_settings(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Return the settings of `accelerate launch` that memory depends on."""
    return {
        "processes": int(environment.get("WORLD_SIZE", "1")),
        "precision": environment.get("ACCELERATE_MIXED_PRECISION", "no"),
    }


def check_fits(run: FinetuningRun, cost: TrainingCost, free: int, total: int) -> None:
    """Raise ``DyexportError`` if a run takes more than the ``free`` bytes of a GPU that has ``total``."""
    if cost.device_bytes <= free:
        return
    cure = "give --finetune-steps 0 to choose widths by importance instead"
    processes = run.schedule.batch_size
    if estimate(run, processes=processes, precision="bf16").device_bytes <= total:
        cure = (
            f"`accelerate launch --mixed_precision bf16` on up to {processes} GPUs shares a batch among them, or {cure}"
        )
    if cost.device_bytes <= total:
        cure = f"end what takes the rest of its {total / 1e9:.0f} GB, or {cure}"
    raise DyexportError(
        f"fine-tuning {run.preset.name} ({run.size}) takes about {cost.device_bytes / 1e9:.0f} GB of GPU memory and "
        f"this GPU has {free / 1e9:.0f} free; {cure}"
    )


def measured_speed(device: torch.device, *, size: int = 4096, seconds: float = 1.0) -> float:
    """Measure operations per second of (size, size) bf16 products, halved: networks reach about half of that."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    products, start = 0, perf_counter()
    while (elapsed := perf_counter() - start) < seconds:
        torch.matmul(left, right).sum().item()  # .item() waits for the device
        products += 1
    return products * 2 * size**3 / elapsed / 2
