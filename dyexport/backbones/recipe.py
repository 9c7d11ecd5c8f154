"""Recipes: how a build trains, calibrates and stores a model where its settings leave the choice. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from dyexport.backbones.calibration_effort import DEFAULT_EFFORT, SPARSE, CalibrationEffort
from dyexport.bundle.spec import Precision
from dyexport.lora import LoraSpec

BasePrecision = Literal["fp32", "bf16", "int8", "nf4"]
"""Storage of the frozen base under TD-LoRA. bf16 is exact for weights that are published in bf16."""

Optimizer = Literal["adamw", "adamw-8bit"]
"""Optimizer of training; with ``adamw-8bit`` the moments are stored in 8 bits."""

Checkpointing = Literal["auto", "on", "off"]
"""Recomputation of blocks in a backward pass; ``auto``: where the activations of a batch do not fit in memory."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Length and learning rate of a training run.

    ``batch_size`` counts samples over all processes. Over the last ``lr_decay`` of the run, a share, the learning rate
    falls linearly to zero.
    """

    steps: int
    batch_size: int
    learning_rate: float
    ema_decay: float
    lr_decay: float = 0.0


PUBLISHED = Schedule(steps=150_000, batch_size=256, learning_rate=1e-4, ema_decay=0.9999)
"""Fine-tuning of DyDiT (arXiv 2410.03456, appendix A)."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Defaults of a build of one model, as part of its preset.

    ``from_scratch`` trains the static model where there is no checkpoint; None: it needs one. ``finetune`` trains all
    weights, ``finetune_lora`` a TD-LoRA, for which ``td_lora`` is the default. The bundle is stored in ``precision``;
    calibration multiplies in ``calibration_precision`` where the bundle is stored in that. ``data`` is the source of
    latents, such as 'synthetic'; None: training needs ``--data``. With ``distill``, the dynamic path learns from the
    complete model. With ``needs_gpu``, fine-tuning without a GPU is refused. ``base_precision`` is that of the frozen
    base under TD-LoRA.
    """

    finetune: Schedule = PUBLISHED
    finetune_lora: Schedule = PUBLISHED
    from_scratch: Schedule | None = None
    td_lora: LoraSpec | None = None
    precision: Precision = "fp32"
    calibration_precision: Precision = "fp32"
    data: str | None = None
    calibration: CalibrationEffort = DEFAULT_EFFORT
    distill: bool = False
    needs_gpu: bool = False
    base_precision: BasePrecision = "fp32"

    def as_json(self) -> dict[str, Any]:
        values = asdict(replace(self, td_lora=None))
        return {**values, "td_lora": None if self.td_lora is None else self.td_lora.model_dump()}


FULL_FINETUNING = Recipe()
LOW_RANK_FINETUNING = Recipe(
    finetune=Schedule(steps=10_000, batch_size=8, learning_rate=1e-4, ema_decay=0.999),
    finetune_lora=Schedule(steps=10_000, batch_size=8, learning_rate=1e-4, ema_decay=0.999),
    td_lora=LoraSpec(rank=16, experts=4, alpha=16),
    precision="bf16",
    calibration_precision="bf16",
    data="synthetic",
    needs_gpu=True,
    base_precision="bf16",
)
LOW_RANK_FROM = 2_000_000_000  # parameters: training all of more, with gradients and moments, does not fit on a GPU
SPARSE_FROM = 1e12  # parameters x tokens: calibrating one sample of more takes minutes on a CPU


def recipe_for(parameters: int, tokens: int) -> Recipe:
    """Return the recipe for a model of that size: presets without data of their own follow this rule too."""
    recipe = LOW_RANK_FINETUNING if parameters >= LOW_RANK_FROM else FULL_FINETUNING
    return replace(recipe, calibration=SPARSE) if parameters * tokens >= SPARSE_FROM else recipe
