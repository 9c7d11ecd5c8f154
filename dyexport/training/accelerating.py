"""Checks of accelerate's settings: training is data-parallel, and divides batches itself."""

from __future__ import annotations

import os
from collections.abc import Mapping

from dyexport.backbones.recipe import BasePrecision
from dyexport.errors import UsageError

ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}  # by the variables that `accelerate launch` sets


PRECISION = "ACCELERATE_MIXED_PRECISION"


def check_accelerate(base_precision: BasePrecision = "fp32", environment: Mapping[str, str] = os.environ) -> None:
    """Raise ``UsageError`` for settings that training does not support: it divides batches itself, and in bf16."""
    if (steps := environment.get(ACCUMULATION, "1").strip()) != "1":
        raise UsageError(
            f"{ACCUMULATION} is {steps} (gradient_accumulation_steps in accelerate's configuration), and a step of "
            "training here is one whole batch; set it to 1, and give --micro-batch if a batch does not fit"
        )
    if base_precision != "fp32" and (mixed := environment.get(PRECISION, "no").strip()) not in ("", "no", "bf16"):
        raise UsageError(
            f"{PRECISION} is {mixed}, and a base in {base_precision} is multiplied in bf16; launch with "
            "--mixed_precision bf16, or give --base-precision fp32"
        )
    for variable, kind in SHARDED.items():
        if environment.get(variable, "").strip().lower() in ("1", "true", "yes", "on", "y", "t"):
            raise UsageError(
                f"{variable} is set, and weights are not sharded here; launch without {kind}, on several GPUs"
            )
