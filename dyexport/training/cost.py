"""Estimates of the time and memory of fine-tuning, and a check that the GPU is large enough."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from time import perf_counter

import torch

from dyexport.backbones import get_conditioning
from dyexport.backbones.base import Preset
from dyexport.errors import DyexportError
from dyexport.flops import FlopsModel
from dyexport.training.memory import (
    SLACK,
    Division,
    FinetuningRun,
    Launch,
    TrainingMemory,
    alternatives,
    choose_division,
    memory_of,
    sizes_of,
)

FORWARD, BACKWARD = 1, 2  # a backward pass computes gradients of activations and of weights: two forward passes


@dataclass(frozen=True, kw_only=True)
class TrainingCost:
    """Floating-point operations, device memory and bytes of data on disk of a fine-tuning run."""

    synthetic_flops: float
    training_flops: float
    memory: TrainingMemory
    data_bytes: float

    def hours(self, flops_per_second: float) -> float:
        return (self.synthetic_flops + self.training_flops) / flops_per_second / 3600


def count_trainable(run: FinetuningRun) -> dict[str, float]:
    """Count the parameters that a run trains, and their share of what full fine-tuning trains."""
    sizes = sizes_of(run)
    return {"trainable_parameters": sizes.trained, "trainable_share": sizes.trained / sizes.full}


def estimate(run: FinetuningRun, division: Division, launch: Launch | None = None) -> TrainingCost:
    """Estimate a run from its sizes, to within 50 %. Masks save nothing in training, so every pass is dense."""
    launch = launch or Launch()
    preset, schedule, synthetic = run.preset, run.schedule, run.synthetic
    forward = 2 * FlopsModel.of_preset(preset).dense  # a multiply-add is two operations
    samples, steps = (0, 0) if synthetic is None else (synthetic.samples, synthetic.steps or 0)
    passes_per_step = 2 if preset.guidance_kind == "classifier-free" else 1
    passes = 2 if run.distill else 1.2  # the dynamic path, and the complete model for a share of the run
    backward = BACKWARD if run.td_lora is None else FORWARD  # frozen weights need no gradients
    recomputed = FORWARD if division.checkpointing else 0
    divided = FORWARD if division.micro_batch * launch.processes < schedule.batch_size else 0  # the batch's ratio
    per_sample = passes * (FORWARD + backward + recomputed) + divided
    return TrainingCost(
        synthetic_flops=samples * steps * passes_per_step * forward,
        training_flops=schedule.steps * schedule.batch_size * per_sample * forward,
        memory=memory_of(run, division, launch),
        data_bytes=samples * 4 * _values_per_sample(preset),
    )


def _values_per_sample(preset: Preset) -> int:
    """Count the numbers of one sample: its latent and its conditions."""
    conditions = (column.shape for column in get_conditioning(preset).columns)
    return prod(preset.latent_shape) + sum(
        prod(preset.text_tokens if size is None else size for size in shape) for shape in conditions
    )


def describe_memory(run: FinetuningRun, free: float, launch: Launch) -> str:
    """Describe in one line what fine-tuning takes of a device with ``free`` bytes, and how it divides a batch."""
    division = choose_division(run, free, launch)
    memory = memory_of(run, division, launch)
    other = memory_of(run, replace(division, checkpointing=not division.checkpointing), launch).activations
    kept = f"{_gb(other)} if kept" if division.checkpointing else f"{_gb(other)} if recomputed"
    how = "recomputed" if division.checkpointing else "kept"
    share = run.schedule.batch_size // launch.processes
    return (
        f"memory of fine-tuning, estimated: {_gb(memory.total)} ({_gb(memory.weights)} weights, "
        f"{_gb(memory.gradients)} gradients, {_gb(memory.optimizer)} optimizer and averages, "
        f"{_gb(memory.activations)} activations, {how}; {kept}), {division.micro_batch} of {share} samples at a time; "
        f"{_gb(free)} free"
    )


def _gb(count: float) -> str:
    if count < 1e8:
        return f"{count / 1e6:.1f} MB"
    return f"{count / 1e9:.1f} GB" if count < 1e10 else f"{count / 1e9:.0f} GB"


def check_gpu(run: FinetuningRun) -> str:
    """Describe in one sentence what a run takes. Raises ``DyexportError`` without a GPU with enough free memory."""
    if not torch.cuda.is_available():
        raise DyexportError(
            f"fine-tuning {run.preset.name} ({run.size}) takes a GPU and torch sees none; give --finetune-steps 0 to "
            "choose widths by importance instead, and --checkpoint DIR where the model hub cannot be reached"
        )
    launch, (free, total) = Launch.current(), torch.cuda.mem_get_info()
    check_fits(run, free, total, launch)
    cost = estimate(run, choose_division(run, free, launch), launch)
    speed = measured_speed(torch.device("cuda"))
    return (
        f"fine-tuning {run.preset.name}: about {cost.hours(speed):.0f} hours at the {speed / 1e12:.0f} TFLOP/s that "
        f"this GPU does now, {cost.memory.total / 1e9:.0f} GB of its memory, {cost.data_bytes / 1e9:.1f} GB of data; "
        "--finetune-steps 0 skips it"
    )


def check_fits(run: FinetuningRun, free: float, total: float, launch: Launch) -> None:
    """Raise ``DyexportError`` if a run takes more than the ``free`` bytes of a GPU that has ``total``."""
    least = memory_of(run, choose_division(run, free, launch), launch)
    if least.fits(free):
        return
    cure = "give --finetune-steps 0 to choose widths by importance instead"
    if least.fits(total):
        cure = f"end what takes the rest of its {total / 1e9:.0f} GB, or {cure}"
    elif (change := smaller(run, free, launch)) is not None:
        cure = f"{change}, or {cure}"
    raise DyexportError(
        f"fine-tuning {run.preset.name} ({run.size}) takes about {least.total / 1e9:.0f} GB of GPU memory, "
        f"{SLACK - 1:.0%} more with fragments, and this GPU has {free / 1e9:.0f} free; {cure}"
    )


def smaller(run: FinetuningRun, free: float, launch: Launch) -> str | None:
    """Return a change of options with which a run fits in ``free`` bytes; None if there is none."""
    free_run = replace(run, checkpointing="auto", micro_batch=None)
    for other in (free_run, *alternatives(free_run)):
        if memory_of(other, choose_division(other, free, launch), launch).fits(free):
            given = {
                "--base-precision": (other.base_precision, run.base_precision),
                "--optimizer": (other.optimizer, run.optimizer),
            }
            options = [f"{option} {new}" for option, (new, old) in given.items() if new != old]
            return f"give {' '.join(options)}" if options else "leave out --gradient-checkpointing and --micro-batch"
    return None


def measured_speed(device: torch.device, *, size: int = 4096, seconds: float = 1.0) -> float:
    """Measure operations per second of (size, size) bf16 products, halved: networks reach about half of that."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    products, start = 0, perf_counter()
    while (elapsed := perf_counter() - start) < seconds:
        torch.matmul(left, right).sum().item()  # .item() waits for the device
        products += 1
    return products * 2 * size**3 / elapsed / 2
