"""Demands of fine-tuning: its memory, its trained parameters, and whether this machine meets them."""

from __future__ import annotations

from dyexport.models.frozen_base import check_base_precision
from dyexport.pipeline.monitoring import check_monitoring
from dyexport.pipeline.settings import SYNTHETIC, BuildSettings
from dyexport.training.accelerating import check_accelerate
from dyexport.training.cost import check_gpu, count_trainable, describe_memory
from dyexport.training.memory import FinetuningRun, Launch, free_memory
from dyexport.training.optimizers import check_optimizer


def finetuning_run(settings: BuildSettings) -> FinetuningRun | None:
    """Return the parameters of the cost of fine-tuning; None for a build that does not fine-tune."""
    if settings.routers != "trained":
        return None
    return FinetuningRun(
        preset=settings.preset,
        schedule=settings.finetune_schedule,
        router=settings.router_kind,
        token_router=settings.token_router_kind,
        td_lora=settings.lora,
        distill=settings.recipe.distill,
        base_precision=settings.frozen_precision,
        optimizer=settings.optimizer,
        checkpointing=settings.checkpointing,
        micro_batch=settings.micro_batch,
        synthetic=settings.sampling if settings.data_source == SYNTHETIC else None,
    )


def trainable(settings: BuildSettings) -> dict[str, float]:
    """Count trained parameters; {} for a build that does not fine-tune."""
    run = finetuning_run(settings)
    return {} if run is None else count_trainable(run)


def training_memory(settings: BuildSettings) -> str | None:
    """Describe the memory that fine-tuning takes here; None for a build that does not fine-tune."""
    run = finetuning_run(settings)
    return None if run is None else describe_memory(run, free_memory(), Launch.current())


def check_training(settings: BuildSettings) -> str | None:
    """Describe what fine-tuning a model that needs a GPU takes; None for any other build.

    Raises ``DyexportError`` without a GPU with enough free memory, ``UsageError`` for settings of accelerate that
    training does not support, ``CheckpointError`` for a VAE that cannot be read, and ``MissingDependencyError``.
    """
    run = finetuning_run(settings)
    if run is not None or settings.from_scratch:
        check_accelerate(settings.frozen_precision)
        check_base_precision(settings.frozen_precision)
        check_optimizer(settings.optimizer)
        check_monitoring(settings)
    return check_gpu(run) if run is not None and settings.recipe.needs_gpu else None
