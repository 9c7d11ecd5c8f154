"""Combinations of build settings that are refused, with the sentence that says why. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from dyexport.bundle.plan_info import OLDEST_FP8
from dyexport.bundle.targets import TARGETS, Option
from dyexport.checkpoints.stored_routers import stored_budgets
from dyexport.errors import BudgetError, UsageError
from dyexport.pipeline.pictures import picture_folder

if TYPE_CHECKING:
    from dyexport.pipeline.settings import BuildSettings


class Rule(NamedTuple):
    """A combination of settings that is refused.

    ``message`` is formatted with the settings ``s`` and the names of ``named``.
    """

    applies: Callable[[BuildSettings], bool]
    message: str
    error: type[UsageError] = UsageError


def named(settings: BuildSettings) -> dict[str, str]:
    """Return what messages name besides the settings; empty where it does not exist."""
    return {
        "static_target": next(iter(_static_targets(settings)), ""),
        "module_target": next(iter(_module_targets(settings)), ""),
        "old_gpu": next(iter(_without_fp8(settings)), ""),
        "oldest_fp8": str(OLDEST_FP8),
        "memory_option": next(iter(_memory_options(settings)), ""),
        "tracking_option": "--tracker" if settings.tracker else "--evaluate-every",
    }


def _memory_options(settings: BuildSettings) -> list[str]:
    """Return the options given that say how fine-tuning uses memory."""
    given = {
        "--base-precision": settings.base_precision is not None,
        "--optimizer": settings.optimizer != "adamw",
        "--gradient-checkpointing": settings.checkpointing != "auto",
        "--micro-batch": settings.micro_batch is not None,
    }
    return [option for option, is_given in given.items() if is_given]


def _static_targets(settings: BuildSettings) -> list[str]:
    return [target for target in settings.targets if TARGETS[target].static_tokens]


def _module_targets(settings: BuildSettings) -> list[str]:
    return [target for target in settings.targets if TARGETS[target].from_modules]


def _has(settings: BuildSettings, option: Option) -> bool:
    """Tell whether a target has an option."""
    return any(option in TARGETS[target].options for target in settings.targets)


def _is_static(settings: BuildSettings) -> bool:
    return settings.planned_widths == "static"


def _without_fp8(settings: BuildSettings) -> list[str]:
    return [text for text in settings.tensorrt.compute_capabilities if float(text) < OLDEST_FP8]


def _needs_plans(option: str) -> str:
    return f"{option} is for TensorRT plans; add --target tensorrt-rtx, or leave it out"


def _leave_out(option: str) -> str:
    return f"{{s.checkpoint}} has routers already and is taken as it is; leave {option} out"


RULES = (
    Rule(
        lambda s: s.checkpoint is not None and s.random_weights,
        "--checkpoint and --random-weights exclude each other; give one of them",
    ),
    # Targets
    Rule(
        lambda s: s.token_path == "compact" and bool(_static_targets(s)),
        "--token-path compact allocates by data, which {static_target} cannot; use dynamic, capacity or masked",
    ),
    Rule(
        lambda s: bool(s.tensorrt.compute_capabilities) and not _has(s, "compute_capability"),
        _needs_plans("--compute-capability"),
    ),
    Rule(lambda s: bool(s.tensorrt.profiles) and not _has(s, "profile"), _needs_plans("--profile")),
    Rule(
        lambda s: s.tensorrt.stream_weights and not _has(s, "stream_weights"),
        _needs_plans("--stream-weights"),
    ),
    Rule(
        lambda s: s.quantize is not None and s.merge_tolerance is not None,
        "--merge-tolerance is not measured in {s.quantize}; leave it or --quantize out",
    ),
    Rule(
        lambda s: s.quantize is not None and bool(_module_targets(s)),
        "--quantize is for targets made from graphs, and {module_target} is not; leave one of them out",
    ),
    Rule(
        lambda s: s.quantize == "fp8" and bool(_without_fp8(s)),
        "--compute-capability {old_gpu} has no fp8, which GPUs have from {oldest_fp8} on; "
        "leave it out, or use --quantize int8",
    ),
    # Data
    Rule(
        lambda s: s.data_source == "synthetic" and s.from_scratch,
        "--data synthetic is sampled from a static model; give its --checkpoint",
    ),
    Rule(
        lambda s: s.train_steps is not None and not s.from_scratch,
        "--train-steps is for training from scratch, which needs a digits or emoji model and no --checkpoint",
    ),
    Rule(
        lambda s: s.prompts is not None and bool(s.preset.classes),
        "--data {s.data} names prompts, and {s.preset.name} samples from class labels; give --data synthetic",
    ),
    Rule(
        lambda s: s.vae is not None and picture_folder(s) is None and s.preset.pixel_space,
        "{s.preset.name} samples pixels, which no VAE decodes; leave --vae out",
    ),
    Rule(
        lambda s: s.vae is not None and picture_folder(s) is None and not s.evaluate_every,
        "--vae encodes pictures, and --data is {s.data_source}; give a folder of pictures, or --evaluate-every to see "
        "samples, or leave --vae out",
    ),
    Rule(
        lambda s: s.synthetic is not None and s.data_source != "synthetic",
        "--synthetic says how --data synthetic is sampled; give that, or leave it out",
    ),
    # Routers
    Rule(lambda s: s.router != "free" and s.routers == "given", _leave_out("--router")),
    Rule(
        lambda s: s.widths not in (None, s.planned_widths),
        "{s.checkpoint} has routers of {s.planned_widths} widths and is taken as it is; leave --widths out",
    ),
    Rule(
        lambda s: _is_static(s) and s.engines != 1,
        "static widths are one engine for all timesteps, and --engines is {s.engines}; use -k 1",
    ),
    Rule(
        lambda s: _is_static(s) and s.router != "free",
        "--router {s.router} is about units at each timestep, and static widths are the same at all; use --router free",
    ),
    Rule(
        lambda s: _is_static(s) and s.token_path != "auto",
        "--token-path {s.token_path} skips tokens, and with static widths every token runs; use --token-path auto",
    ),
    Rule(lambda s: s.token_router is not None and s.routers == "given", _leave_out("--token-router")),
    Rule(
        lambda s: s.token_router is not None and len(s.preset.token_routers) == 1,
        "{s.preset.name} has one kind of token routers, {s.preset.token_routers[0]}; leave --token-router out",
    ),
    Rule(
        lambda s: s.token_router is not None and s.token_router_kind is None,
        "--token-router {s.token_router} is about new token routers, and every token runs; leave it out",
    ),
    Rule(lambda s: bool(s.finetune_steps) and s.routers == "given", _leave_out("--finetune-steps")),
    Rule(
        lambda s: s.budget is None and s.routers in ("trained", "none"),
        "{s.preset.name} has no routers yet, so it needs a --budget, such as 0.5",
        BudgetError,
    ),
    Rule(
        lambda s: bool(s.budgets) and s.budget not in s.budgets,
        "the default budget {s.budget} is none of {s.budgets}; give one of them",
        BudgetError,
    ),
    Rule(
        lambda s: bool(s.budgets) and s.routers == "none",
        "several budgets share the weights of one model that is trained for all of them, and nothing is trained here; "
        "give one --budget, or fine-tune",
        BudgetError,
    ),
    Rule(
        lambda s: s.budget is None and bool(stored_budgets(s.checkpoint)),
        "{s.checkpoint} was trained for several budgets; give one of them, or all, as --budget",
        BudgetError,
    ),
    Rule(
        lambda s: s.data_source is None and s.routers == "trained",
        "fine-tuning {s.preset.name} needs --data, such as a directory of latents or 'synthetic'; "
        "to do without, give --finetune-steps 0",
    ),
    # Memory of fine-tuning
    Rule(
        lambda s: s.routers != "trained" and bool(_memory_options(s)),
        "{memory_option} is for fine-tuning, and this build trains nothing; leave it out",
    ),
    Rule(
        lambda s: s.base_precision not in (None, "fp32") and s.lora is None,
        "--base-precision {s.base_precision} is of a frozen base, and {s.preset.name} trains all weights; "
        "give --td-lora, such as rank=16,experts=4, or leave it out",
    ),
    Rule(
        lambda s: bool(s.micro_batch and s.routers == "trained" and s.finetune_schedule.batch_size % s.micro_batch),
        "--micro-batch {s.micro_batch} does not divide the batch of {s.finetune_schedule.batch_size}; use a divisor",
    ),
    # Training runs
    Rule(
        lambda s: not s.trains and bool(s.tracker or s.evaluate_every),
        "{tracking_option} is for training, and this build trains nothing; leave it out",
    ),
    # LoRA
    Rule(lambda s: s.td_lora is not None and s.routers == "given", _leave_out("--td-lora")),
    Rule(
        lambda s: s.td_lora is not None and s.td_lora.rank > s.preset.hidden_size,
        "--td-lora has rank {s.td_lora.rank} and {s.preset.name} {s.preset.hidden_size} channels; give fewer",
    ),
    Rule(
        lambda s: _is_static(s) and s.td_lora is not None and s.td_lora.experts > 1,
        "--td-lora mixes {s.td_lora.experts} experts by timestep, and static widths are the same at all timesteps; "
        "use experts=1",
    ),
    Rule(
        lambda s: s.td_lora is not None and s.routers == "none",
        "with --finetune-steps 0 nothing is trained; leave --td-lora out",
    ),
    Rule(
        lambda s: bool(s.loras) and (s.random_weights or s.from_scratch),
        "--lora changes weights that it was made for; give their --checkpoint",
    ),
    Rule(
        lambda s: s.merge_tolerance is not None and s.td_lora is None and s.routers != "given",
        "--merge-tolerance is for models with TD-LoRA; give --td-lora, or leave it out",
    ),
)
