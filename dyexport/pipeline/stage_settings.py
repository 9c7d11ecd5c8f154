"""The settings that each model of a work directory was made with; models of other settings are kept next to it.

A model takes hours, so none is replaced because another was asked for. What is exported takes minutes, and the bundle
has it: of that the latest is kept, which bounds what a work directory takes to one model for each choice of settings.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dyexport.pipeline.settings import BuildSettings
from dyexport.presets import stored_fields


def model_key(settings: BuildSettings) -> dict[str, Any]:
    """Identify the model: by its name, and by its sizes where the name alone does not tell them."""
    fields = stored_fields(settings.preset)
    return {"model": settings.preset.name} if fields is None else {"model": settings.preset.name, "sizes": fields}


def static_settings(settings: BuildSettings) -> dict[str, Any]:
    """Settings of the static model."""
    chosen: dict[str, Any] = {**model_key(settings), "checkpoint": settings.checkpoint}
    chosen |= {"loras": [[str(lora.file), lora.scale] for lora in settings.loras]}
    if settings.random_weights or settings.from_scratch:
        chosen["seed"] = settings.seed
    if settings.from_scratch:
        chosen |= {"train_steps": settings.static_schedule.steps, **data_settings(settings)}
    return chosen


def data_settings(settings: BuildSettings) -> dict[str, Any]:
    """Settings of training and calibration data."""
    if settings.data_source != "synthetic":
        return {"data": settings.data_source}
    prompts = None if settings.prompts is None else str(settings.prompts)
    return {"data": "synthetic", "prompts": prompts, "synthetic": asdict(settings.sampling)}


def control_settings(settings: BuildSettings) -> dict[str, Any]:
    """Settings of the static model that is trained as long as the dynamic one."""
    steps = settings.finetune_schedule.steps
    return static_settings(settings) | data_settings(settings) | {"seed": settings.seed, "finetune_steps": steps}


def dynamic_settings(settings: BuildSettings) -> dict[str, Any]:
    """Settings of the dynamic model."""
    lora = None if settings.lora is None else settings.lora.model_dump()
    chosen: dict[str, Any] = {"seed": settings.seed, "routers": settings.routers, "router": settings.router}
    chosen["td_lora"] = lora
    if settings.routers == "trained":
        chosen |= {"budget": settings.budget, "finetune_steps": settings.finetune_schedule.steps}
    return static_settings(settings) | data_settings(settings) | chosen


def calibrated_settings(settings: BuildSettings) -> dict[str, Any]:
    """Settings of the dynamic model on budget."""
    return dynamic_settings(settings) | {"budget": settings.budget, "in_bf16": settings.calibrates_in_bf16}
