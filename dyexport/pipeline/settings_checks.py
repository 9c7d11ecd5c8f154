"""Checks of build settings: choices, ranges, and combinations that cannot be built. Imports no torch."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from dyexport.arguments import check_memory, check_seed, whole_number
from dyexport.backbones.base import UnitChoice
from dyexport.backbones.recipe import BasePrecision, Checkpointing, Optimizer
from dyexport.bundle.plan_info import OLDEST_FP8
from dyexport.bundle.spec import Precision, Quantization, TokenRouterKind, Widths
from dyexport.bundle.targets import TARGETS, Option
from dyexport.calibration.segments import PlanSettings
from dyexport.checkpoints.stored_routers import stored_budgets
from dyexport.errors import BudgetError, UsageError
from dyexport.pipeline.output import check_ours
from dyexport.pipeline.pictures import picture_folder, picture_settings
from dyexport.training.data_files import check_source, read_prompts

if TYPE_CHECKING:
    from dyexport.lora import LoraFile
    from dyexport.pipeline.settings import BuildSettings

MOST_STEPS = 10**9
SHOWN = 200  # characters of a name in a message


def check(settings: BuildSettings) -> None:
    """Check settings: values first, then the model and combinations, then files.

    Raises ``UsageError``, ``BudgetError``, ``CheckpointError`` and ``DataError``.
    """
    check_values(vars(settings))
    _ = settings.preset  # raises for an unknown model, and for a checkpoint that does not exist
    for lora in settings.loras:
        _check_lora_file(lora)
    for rule in RULES:
        if rule.applies(settings):
            raise rule.error(rule.message.format(s=settings, **_named(settings)))
    _ = settings.sampling  # raises for guidance that the model does not take
    _check_places(settings.out, settings.work)
    _check_data(settings)


def check_names(names: Iterable[str], known: Sequence[str]) -> None:
    """Raise ``UsageError`` for a name of a setting that is not ``known``."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise UsageError(f"unknown setting {name!r}; {hint}")


def check_values(values: Mapping[str, Any]) -> None:
    """Check settings one by one, as far as that needs no model. Raises ``UsageError``, ``BudgetError``."""
    for name, check_value in VALUE_CHECKS.items():
        if name in values and (values[name] is not None or name in NEVER_NONE):
            check_value(values[name])


def _check_targets(targets: Sequence[str]) -> None:
    for target in targets or ("",):
        if target not in TARGETS:
            raise UsageError(f"unknown target {target!r}; known: {', '.join(TARGETS)}")


def _check_budget(budget: float) -> None:
    if not 0 < budget <= 1:
        raise BudgetError(f"budget is {budget:g}; give a FLOPs ratio in (0, 1], such as 0.5")


def _check_budgets(budgets: Sequence[float]) -> None:
    for budget in budgets:
        _check_budget(budget)
    if len(budgets) == 1 or len(set(budgets)) < len(budgets):
        raise BudgetError(f"budgets are {', '.join(f'{b:g}' for b in budgets)}; give two or more, each once")


def _check_choice(option: str, value: str, kind: object) -> None:
    choices = get_args(kind)
    if value not in choices:
        raise UsageError(f"{option} is {value!r}; use {' or '.join((', '.join(choices[:-1]), choices[-1]))}")


def _check_tolerance(tolerance: float) -> None:
    if not 0 <= tolerance < math.inf:
        raise UsageError(f"--merge-tolerance is {tolerance}; give a relative MSE, such as 1e-4")


VALUE_CHECKS: Mapping[str, Callable[[Any], object]] = {
    "engines": lambda value: PlanSettings(engines=value),
    "token_path": lambda value: PlanSettings(engines=1, token_path=value),
    "targets": _check_targets,
    "budget": _check_budget,
    "budgets": _check_budgets,
    "widths": lambda value: _check_choice("--widths", value, Widths),
    "router": lambda value: _check_choice("--router", value, UnitChoice),
    "token_router": lambda value: _check_choice("--token-router", value, TokenRouterKind),
    "precision": lambda value: _check_choice("--precision", value, Precision),
    "quantize": lambda value: _check_choice("--quantize", value, Quantization),
    "base_precision": lambda value: _check_choice("--base-precision", value, BasePrecision),
    "optimizer": lambda value: _check_choice("--optimizer", value, Optimizer),
    "checkpointing": lambda value: _check_choice("--gradient-checkpointing", value, Checkpointing),
    "micro_batch": lambda value: whole_number("--micro-batch", value, least=1, most=MOST_STEPS),
    "seed": lambda value: check_seed(value, "--seed"),
    "memory": check_memory,
    "train_steps": lambda value: whole_number("--train-steps", value, least=1, most=MOST_STEPS),
    "finetune_steps": lambda value: whole_number("--finetune-steps", value, least=0, most=MOST_STEPS),
    "merge_tolerance": _check_tolerance,
}
NEVER_NONE = frozenset({"engines", "token_path", "targets", "router", "seed", "optimizer", "checkpointing"})


def _check_lora_file(lora: LoraFile) -> None:
    if not lora.file.is_file():
        raise UsageError(f"--lora {lora.file} is not a file; write FILE or FILE@SCALE, FILE in safetensors")
    if not math.isfinite(lora.scale):
        raise UsageError(f"--lora {lora.file}@{lora.scale}: the scale is not finite; give a number such as 0.8")


def _check_places(out: Path, work: Path) -> None:
    for option, path in (("-o", out), ("--work", work)):
        try:
            path.resolve().exists()
        except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a zero byte
            raise UsageError(f"{option} {str(path)[:SHOWN]!r} can be no directory; give another name") from error
    if out.resolve() == work.resolve():
        raise UsageError(f"-o and --work are both {out}; give two directories")
    if work.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"--work {work} lies in the bundle {out}, which is replaced; give another one")
    check_ours(out)


def _check_data(settings: BuildSettings) -> None:
    """Raise ``DataError`` for training data that does not exist or is of another model."""
    if settings.prompts is not None:
        read_prompts(settings.prompts)
    if picture_folder(settings) is not None:
        picture_settings(settings).read_folder()
    elif settings.data_source not in (None, "synthetic"):
        check_source(settings.data_source, settings.preset)


class Rule(NamedTuple):
    """A combination of settings that is refused.

    ``message`` is formatted with the settings ``s`` and the names of ``_named``.
    """

    applies: Callable[[BuildSettings], bool]
    message: str
    error: type[UsageError] = UsageError


def _named(settings: BuildSettings) -> dict[str, str]:
    """Return what messages name besides the settings; empty where it does not exist."""
    return {
        "static_target": next(iter(_static_targets(settings)), ""),
        "module_target": next(iter(_module_targets(settings)), ""),
        "old_gpu": next(iter(_without_fp8(settings)), ""),
        "oldest_fp8": str(OLDEST_FP8),
        "memory_option": next(iter(_memory_options(settings)), ""),
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
        lambda s: s.vae is not None and picture_folder(s) is None,
        "--vae encodes pictures, and --data is {s.data_source}; give a folder of pictures, or leave --vae out",
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
