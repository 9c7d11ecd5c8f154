"""Steps of fine-tuning with random weights: seconds and peak memory, next to the estimate that a build prints."""

from __future__ import annotations

import os
import re
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.cases import fill, sized_preset
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.with_torch import peak_bytes
from dyexport.backbones import get_adapter, get_conditioning
from dyexport.backbones.base import Preset
from dyexport.errors import UsageError
from dyexport.lora import LoraSpec
from dyexport.models.conditions import Batch
from dyexport.models.dynamic import DynamicTransformer
from dyexport.training.config import FinetuneConfig
from dyexport.training.cost import count_trainable
from dyexport.training.finetuning import DynamicTrainer
from dyexport.training.memory import Division, FinetuningRun, Launch, memory_of

CASE = re.compile(r"(?P<model>[^:@]+):(?P<batch>[1-9]\d*)")
STEPS = 10  # of the run that the measured steps belong to; the first two train the complete model too
MEASURED = 5
LORA = LoraSpec(rank=16, experts=4, alpha=16)
SAMPLES = 4  # of the source, used again and again


class NoiseSource:
    """Random latents and conditions: the time of a step does not depend on them."""

    name = "noise"

    def __init__(self, preset: Preset) -> None:
        generator = torch.Generator().manual_seed(0)
        self.latents = torch.randn(SAMPLES, *preset.latent_shape, generator=generator)
        self.conditions = get_conditioning(preset).random(SAMPLES, generator)

    def __len__(self) -> int:
        return SAMPLES

    def batch(self, indices: Tensor) -> Batch:
        return Batch(self.latents[indices], {name: values[indices] for name, values in self.conditions.items()})

    def check_finite(self) -> None:
        """Do nothing: normal numbers are finite."""


def time_finetuning(text: str, settings: Settings) -> dict[str, Any]:
    """Run the first steps of a TD-LoRA fine-tuning. Raises ``UsageError`` for a case that is not MODEL:BATCH."""
    if (found := CASE.fullmatch(text)) is None:
        raise UsageError(f"case {text!r} is not MODEL:BATCH, such as flux/4+8:1")
    preset, batch = sized_preset(found["model"]), int(found["batch"])
    prepare_accelerate(settings.device)
    if settings.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    config = FinetuneConfig(steps=STEPS, batch_size=batch, ema_decay=0.999, settle=0.0, anneal=1.0)
    model = new_model(preset, settings.device)
    with TemporaryDirectory() as folder:
        trainer = DynamicTrainer(model, preset, NoiseSource(preset), config, work_dir=Path(folder))
        seconds = [time_step(trainer, settings.device) for _ in range(MEASURED)]
    run = FinetuningRun(preset=preset, schedule=preset.recipe.finetune_lora, td_lora=LORA)
    return {
        "batch": batch,
        "seconds": seconds,
        "complete_steps": config.complete_steps,
        "seconds_complete": seconds[config.complete_steps - 1],
        "seconds_dynamic": seconds[-1],
        "peak_bytes": peak_bytes(settings.device),
        "estimated_bytes": memory_of(run, Division(micro_batch=batch, checkpointing=False), Launch.current()).total,
        **count_trainable(run),
        **asdict(Launch.current()),
    }


def prepare_accelerate(device: str) -> None:
    """Set what ``accelerate launch --mixed_precision bf16`` sets, or the CPU; without effect once one is running."""
    if device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    else:
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"


def new_model(preset: Preset, device: str) -> DynamicTransformer:
    """Make a dynamic model with noise for weights, where it runs: FLUX's would take minutes on a CPU."""
    adapter = get_adapter(preset.backbone)
    with torch.device("meta"):
        backbone = adapter.build(preset.transformer_config())
    backbone = fill(nn.Module.to(backbone, torch.float32), device)
    with torch.device(device):
        return DynamicTransformer(backbone, adapter, heads=preset.heads, tokens=True, td_lora=LORA).eval()


def time_step(trainer: DynamicTrainer, device: str) -> float:
    """Return the seconds of one step, from sampling noise to the average of the weights."""
    begin = perf_counter()
    trainer.advance()
    if device != "cpu":
        torch.cuda.synchronize()
    return perf_counter() - begin
