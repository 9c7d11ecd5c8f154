"""Settings and progress of the commands that build: ``build``, ``finetune``, ``calibrate``, ``export``, ``plan``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer

from dyexport.arguments import parse_bytes
from dyexport.commands.options import split
from dyexport.commands.parsing import ExplicitOptions
from dyexport.commands.results import trainable_lines
from dyexport.console import Interrupted, StageLines, chatter_on_stderr, stderr
from dyexport.errors import BudgetError

if TYPE_CHECKING:
    from dyexport.pipeline.run import Run
    from dyexport.pipeline.settings import BuildSettings


def settings_of(context: typer.Context) -> BuildSettings:
    """Return the settings of a build as the options of a command describe them.

    Options that are not given keep the defaults of ``BuildSettings``. If neither a model nor a checkpoint is given,
    the settings recorded in the work directory take the place of the defaults. Raises ``UsageError``.
    """
    from dyexport.pipeline.settings import BuildSettings, budget_settings, default_engines

    explicit = ExplicitOptions(context)
    options = dict(explicit.values())
    for name in ("json", "debug"):
        options.pop(name, None)
    work = options.pop("work", None)
    if work is not None and not {"model", "checkpoint"} & options.keys():
        recorded = BuildSettings.load(work)
        changes = _changes(options, recorded)
        if changes.get("finetune_steps") == 0 or changes.get("widths") == "static":
            changes.setdefault("token_router", None)  # that of the work directory: now every token runs
        if "widths" in changes and changes["widths"] != recorded.planned_widths:
            changes.setdefault("engines", default_engines(recorded.preset, changes["widths"]))
        if "budget" in changes:
            changes |= budget_settings(changes["budget"])
        for name, value in _without_training(changes, recorded).items():
            changes.setdefault(name, value)
        settings = replace(recorded, **changes)
    else:
        settings = BuildSettings.complete(**_changes(options), work=work)
    kept = f"{settings.checkpoint} has routers already and is taken as it is"
    explicit.refuse(settings.routers == "given", kept, "router", "token_router", "td_lora", "finetune_steps")
    explicit.refuse(settings.routers == "none", "with --finetune-steps 0 every token runs", "token_path")
    return settings


def _without_training(changes: Mapping[str, Any], recorded: BuildSettings) -> dict[str, Any]:
    """Return defaults in place of recorded settings of training runs that other options leave without effect."""
    from dyexport.pipeline.pictures import picture_folder

    defaults: dict[str, Any] = {}
    if changes.get("finetune_steps") == 0 and not recorded.from_scratch:
        defaults |= {"tracker": None, "evaluate_every": 0}
    if {**changes, **defaults}.get("evaluate_every") == 0 and picture_folder(recorded) is None:
        defaults["vae"] = None  # that of evaluations
    return defaults


def _changes(options: Mapping[str, Any], recorded: BuildSettings | None = None) -> dict[str, Any]:
    """Return fields of ``BuildSettings``, parsed from the options that are given."""
    from dyexport.exporters.tensorrt_profiles import TensorrtSettings
    from dyexport.lora import parse_lora, parse_lora_file
    from dyexport.training.synthetic_config import parse_synthetic
    from dyexport.training.trackers import NONE

    parsers: dict[str, tuple[str, Callable[[Any], Any]]] = {
        "td_lora": ("td_lora", parse_lora),
        "lora": ("loras", lambda texts: tuple(map(parse_lora_file, texts))),
        "synthetic": ("synthetic", parse_synthetic),
        "target": ("targets", split),
        "memory": ("memory", parse_bytes),
        "gradient_checkpointing": ("checkpointing", _same),
        "budget": ("budget", parse_budgets),
        "tracker": ("tracker", lambda name: None if name == NONE else name),
    }
    tensorrt_parsers: dict[str, tuple[str, Callable[[Any], Any]]] = {
        "compute_capability": ("compute_capabilities", split),
        "profile": ("profiles", tuple),
        "stream_weights": ("stream_weights", bool),
    }
    fields: dict[str, Any] = {}
    tensorrt: dict[str, Any] = {}
    for name, value in options.items():
        group = tensorrt if name in tensorrt_parsers else fields
        field, parse = {**parsers, **tensorrt_parsers}.get(name, (name, _same))
        group[field] = parse(value)
    if tensorrt:
        fields["tensorrt"] = replace(recorded.tensorrt if recorded else TensorrtSettings(), **tensorrt)
    return fields


def parse_budgets(text: str) -> float | tuple[float, ...]:
    """Parse one FLOPs ratio, or several with commas between. Raises ``BudgetError``."""
    try:
        budgets = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise BudgetError(f"--budget is {text!r}; give a FLOPs ratio, such as 0.5, or several: 0.5,0.3") from error
    return budgets if len(budgets) > 1 else budgets[0]


def _same(value: Any) -> Any:
    return value


@contextmanager
def stage_lines(kept: str = "stage") -> Iterator[StageLines]:
    """Show stages on stderr; Ctrl-C becomes ``Interrupted``, which names what a command keeps when it is finished."""
    try:
        with chatter_on_stderr(), StageLines() as lines:
            yield lines
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted; the same command goes on after the last finished {kept}") from error


def recipe_line(recipe: Mapping[str, Any], trainable: Mapping[str, float]) -> str:
    """Describe in one line the choices that a build makes, where its options and the model's recipe leave them.

    ``trainable`` are the trained parameters and their share, or empty.
    """
    tokens = "" if recipe["token_router"] is None else f", {recipe['token_router']} token routers"
    parts = [f"routers {recipe['routers']}, {recipe['widths']} widths{tokens}"]
    if (scratch := recipe["from_scratch"]) is not None:
        parts.append(f"the static model trained for {scratch['steps']} steps of {scratch['batch_size']}")
    if (schedule := recipe["finetune"]) is not None:
        lora = ""
        if recipe["td_lora"] is not None:
            lora = f", TD-LoRA of rank {recipe['td_lora']['rank']} on a base in {recipe['base_precision']}"
        parts.append(f"fine-tuned for {schedule['steps']} steps of {schedule['batch_size']}{lora}")
        parts += [f"{name} {value}" for name, value in trainable_lines(trainable)]
    if recipe["repair"]:
        parts.append("projections repaired by least squares")
    encoded = "" if recipe["vae"] is None else f", encoded by the VAE in {recipe['vae']}"
    parts.append(f"data {recipe['data'] or 'noise'}{encoded}")
    parts.append(f"stored in {recipe['precision']}, calibrated in {recipe['calibration_precision']}")
    return f"recipe: {'; '.join(parts)}"


def tracking_line(settings: BuildSettings) -> str:
    """Say where the curves and pictures of training can be seen."""
    from dyexport.pipeline.work_directory import TRACKING
    from dyexport.training.trackers import TENSORBOARD

    folder = settings.work / TRACKING
    line = f"training is recorded in {folder}"
    return f"{line}; tensorboard --logdir {folder}" if settings.tracker == TENSORBOARD else line


@contextmanager
def building(settings: BuildSettings, without: frozenset[str] = frozenset()) -> Iterator[Run]:
    """Open a build. Stages in ``without`` must have been done before; they are not run."""
    with stage_lines() as lines:
        from dyexport.pipeline.build import opened
        from dyexport.pipeline.training_cost import check_training, trainable, training_memory
        from dyexport.training.processes import is_first_process

        notes = [] if without else [training_memory(settings), check_training(settings)]
        notes.append(recipe_line(settings.effective_recipe(), trainable(settings)))
        if settings.trains and not without and (settings.tracker or settings.evaluate_every):
            notes.append(tracking_line(settings))
        for note in filter(None, notes) if is_first_process() else ():
            stderr().print(note, soft_wrap=True, markup=False)
        with opened(settings, lines, without=without) as run:
            yield run
