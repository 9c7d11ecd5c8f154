"""Checks of accelerate's settings: training is data-parallel, with one whole batch a step."""

from __future__ import annotations

import os
from collections.abc import Mapping

from dyexport.errors import UsageError

ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}  # by the variables that `accelerate launch` sets


def check_accelerate(environment: Mapping[str, str] = os.environ) -> None:
    """Raise ``UsageError`` for gradient accumulation and sharded weights, which training does not support."""
    if (steps := environment.get(ACCUMULATION, "1").strip()) != "1":
        raise UsageError(
            f"{ACCUMULATION} is {steps} (gradient_accumulation_steps in accelerate's configuration), and a step of "
            "training here is one whole batch; set it to 1, and use more processes if a batch does not fit"
        )
    for variable, kind in SHARDED.items():
        if environment.get(variable, "").strip().lower() in ("1", "true", "yes", "on", "y", "t"):
            raise UsageError(
                f"{variable} is set, and weights are not sharded here; launch without {kind}, on several GPUs"
            )
