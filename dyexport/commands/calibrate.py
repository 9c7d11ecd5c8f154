"""``dyexport calibrate``: the stages of a build up to widths and token counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import typer
from rich.console import Console

from dyexport.commands import options
from dyexport.commands.results import error_line, headroom_lines, other_budget_lines, trainable_lines, unbudgeted_line
from dyexport.commands.stages import building, settings_of
from dyexport.console import DebugOption, JsonOption, emit, pairs

EXAMPLES = (
    "dyexport calibrate --work work/",
    "dyexport calibrate --work work/ --precision bf16 --memory 8GiB",
    "dyexport calibrate --model dit-xl-2 --budget 0.5 --finetune-steps 0",
)


def calibrate(
    context: typer.Context,
    work: options.WorkOption = None,
    model: options.ModelOption = None,
    checkpoint: options.CheckpointOption = None,
    lora: options.LoraOption = None,
    random_weights: options.RandomWeightsOption = False,
    budget: options.BudgetOption = None,
    widths: options.WidthsOption = None,
    data: options.DataOption = None,
    finetune_steps: options.FinetuneStepsOption = None,
    td_lora: options.TdLoraOption = None,
    precision: options.PrecisionOption = None,
    router: options.RouterOption = None,
    token_router: options.TokenRouterOption = None,
    synthetic: options.SyntheticOption = None,
    memory: options.BuildMemoryOption = None,
    seed: options.SeedOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Meet the budget and read widths and token counts off the routers, after fine-tuning if that is not done."""
    settings = settings_of(context)
    with building(settings) as run:
        from dyexport.pipeline.build import calibrate_models

        calibrated, *others = calibrate_models(run)
        payload: dict[str, Any] = {
            "checkpoint": str(calibrated.path),
            "work": str(settings.work),
            **calibrated.metrics,
            "budgets": [{"budget": each.budget, "checkpoint": str(each.path), **each.metrics} for each in others],
            "stages": run.stage_report,
        }

    def show(console: Console) -> None:
        console.print(pairs(_calibration_lines(payload)))
        if settings.budget is None:
            console.print(unbudgeted_line(settings.routers, payload["flops_ratio"]), soft_wrap=True)

    emit(payload, as_json=json, human=show)


def _calibration_lines(payload: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    return (
        ("checkpoint", payload["checkpoint"]),
        ("attention + MLP FLOPs (lambda)", f"{payload['flops_ratio']:.3f} of dense"),
        error_line(payload),
        *trainable_lines(payload),
        *headroom_lines(payload),
        *other_budget_lines(payload),
        ("work directory", payload["work"]),
    )
