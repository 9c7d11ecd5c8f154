"""Checks of build settings: choices, ranges, and combinations that cannot be built. Imports no torch."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dyexport.arguments import check_memory, check_seed, shown, whole_number
from dyexport.backbones.base import Preset, UnitChoice
from dyexport.backbones.recipe import BasePrecision, Checkpointing, Optimizer
from dyexport.bundle.spec import Precision, Quantization, TokenRouterKind, Widths
from dyexport.bundle.targets import TARGETS
from dyexport.calibration.segments import PlanSettings
from dyexport.errors import BudgetError, UsageError
from dyexport.pipeline.output import check_ours
from dyexport.pipeline.pictures import picture_folder, picture_settings
from dyexport.pipeline.settings_rules import RULES, named
from dyexport.training.data_files import check_source, read_prompts
from dyexport.training.trackers import check_tracker

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
            raise rule.error(rule.message.format(s=settings, **named(settings)))
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


def _check_budget(budget: object) -> None:
    number = float(budget) if not isinstance(budget, bool) and isinstance(budget, Real) else None
    if number is None or not 0 < number <= 1:
        value = shown(repr(budget)) if number is None else f"{number:g}"
        raise BudgetError(f"budget is {value}; give a FLOPs ratio in (0, 1], such as 0.5")


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


def _check_model(model: object) -> None:
    if not isinstance(model, str | Preset):
        raise UsageError(f"--model is {shown(repr(model))}; give the name of a preset, such as 'flux'")


def _check_path(option: str, path: object) -> None:
    if not isinstance(path, str | os.PathLike):
        raise UsageError(f"{option} is {shown(repr(path))}; give the path of a directory")


VALUE_CHECKS: Mapping[str, Callable[[Any], object]] = {
    "model": _check_model,
    "out": lambda value: _check_path("-o", value),
    "work": lambda value: _check_path("--work", value),
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
    "tracker": check_tracker,
    "evaluate_every": lambda value: whole_number("--evaluate-every", value, least=0, most=MOST_STEPS),
    "seed": lambda value: check_seed(value, "--seed"),
    "memory": check_memory,
    "train_steps": lambda value: whole_number("--train-steps", value, least=1, most=MOST_STEPS),
    "finetune_steps": lambda value: whole_number("--finetune-steps", value, least=0, most=MOST_STEPS),
    "merge_tolerance": _check_tolerance,
}
NEVER_NONE = frozenset(
    {"engines", "token_path", "targets", "router", "evaluate_every", "seed", "optimizer", "checkpointing"}
)


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
