"""Summary of what a build does, where its settings and the model's recipe leave a choice. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dyexport.pipeline.pictures import vae_of_pictures

if TYPE_CHECKING:
    from dyexport.pipeline.settings import BuildSettings


def recipe_values(settings: BuildSettings) -> dict[str, Any]:
    """Return what a build does as JSON values."""
    trained = settings.routers == "trained"
    lora, recipe = settings.lora, settings.recipe
    return {
        "routers": settings.routers,
        "repair": settings.repairs,
        "widths": settings.planned_widths,
        "token_router": settings.token_router_kind,
        "data": settings.data_source,
        "vae": vae_of_pictures(settings),
        "from_scratch": asdict(settings.static_schedule) if settings.from_scratch else None,
        "finetune": asdict(settings.finetune_schedule) if trained else None,
        "td_lora": None if lora is None else lora.model_dump(),
        "base_precision": settings.frozen_precision if trained else None,
        "optimizer": settings.optimizer if trained else None,
        "distill": recipe.distill and trained,
        "needs_gpu": recipe.needs_gpu and trained,
        "precision": settings.stored_precision,
        "calibration_precision": "bf16" if settings.calibrates_in_bf16 else "fp32",
        "calibration": asdict(recipe.calibration),
    }
