"""Settings that identify each model of a work directory. Models of other settings are kept next to it.

A model takes hours, so a build with other settings does not replace it. Exported files take minutes, and the bundle has
them: only the latest are kept, so a work directory grows by one model for each choice of settings.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dyexport.pipeline.pictures import picture_folder
from dyexport.pipeline.settings import BuildSettings
from dyexport.presets import stored_fields


def model_key(settings: BuildSettings) -> dict[str, Any]:
    """Identify the model: by its name, and by its sizes where the name alone does not tell them."""
    fields = stored_fields(settings.preset)
    return {"model": settings.preset.name} if fields is None else {"model": settings.preset.name, "sizes": fields}


def static_settings(settings: BuildSettings) -> dict[str, Any]:
    """Return the settings of the static model."""
    chosen: dict[str, Any] = {**model_key(settings), "checkpoint": settings.checkpoint}
    chosen |= {"loras": [[str(lora.file), lora.scale] for lora in settings.loras]}
    if settings.random_weights or settings.from_scratch:
        chosen["seed"] = settings.seed
    if settings.from_scratch:
        chosen |= {"train_steps": settings.static_schedule.steps, **data_settings(settings)}
    return chosen


def data_settings(settings: BuildSettings) -> dict[str, Any]:
    """Return the settings of training and calibration data."""
    if picture_folder(settings) is not None:
        return {"data": settings.data_source, "vae": settings.vae}
    if settings.data_source != "synthetic":
        return {"data": settings.data_source}
    prompts = None if settings.prompts is None else str(settings.prompts)
    return {"data": "synthetic", "prompts": prompts, "synthetic": asdict(settings.sampling)}


def control_settings(settings: BuildSettings) -> dict[str, Any]:
    """Return the settings of the static model that is trained for as long as the dynamic one."""
    steps = settings.finetune_schedule.steps
    return static_settings(settings) | data_settings(settings) | {"seed": settings.seed, "finetune_steps": steps}


def dynamic_settings(settings: BuildSettings) -> dict[str, Any]:
    """Return the settings of the dynamic model before calibration."""
    lora = None if settings.lora is None else settings.lora.model_dump()
    chosen: dict[str, Any] = {"seed": settings.seed, "routers": settings.routers, "router": settings.router_kind}
    chosen |= {"td_lora": lora, **token_router_settings(settings)}
    chosen |= memory_settings(settings)
    if settings.routers == "trained":
        chosen |= {**trained_budget(settings), "finetune_steps": settings.finetune_schedule.steps}
    return static_settings(settings) | data_settings(settings) | chosen


def token_router_settings(settings: BuildSettings) -> dict[str, Any]:
    """Return the kind of new token routers; omitted for the oldest, so that older work directories stay valid."""
    kind = settings.token_router_kind
    return {} if kind in (None, settings.preset.token_routers[0]) else {"token_router": kind}


def sampling_precision(settings: BuildSettings) -> dict[str, Any]:
    """Return the storage of the model that samples synthetic data: that of the frozen base; none for fp32."""
    return {} if settings.frozen_precision == "fp32" else {"base_precision": settings.frozen_precision}


def memory_settings(settings: BuildSettings) -> dict[str, Any]:
    """Return the settings of memory that change what is trained; none at the defaults, so that ledgers stay valid."""
    chosen = sampling_precision(settings)
    if settings.optimizer != "adamw":
        chosen["optimizer"] = settings.optimizer
    return chosen


def trained_budget(settings: BuildSettings) -> dict[str, Any]:
    """Return the budget that a model is trained for, or all of them."""
    return {"budgets": sorted(settings.budgets)} if settings.budgets else {"budget": settings.budget}


def calibrated_settings(settings: BuildSettings) -> dict[str, Any]:
    """Return the settings of the calibrated model."""
    return dynamic_settings(settings) | {"budget": settings.budget, "in_bf16": settings.calibrates_in_bf16}
