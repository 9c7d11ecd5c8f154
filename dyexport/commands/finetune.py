"""``dyexport finetune``: the first stages of a build, up to the trained model."""

from __future__ import annotations

from typing import Any

import typer

from dyexport.commands import options
from dyexport.commands.results import trainable_lines
from dyexport.commands.stages import building, settings_of
from dyexport.console import DebugOption, JsonOption, emit, pairs

EXAMPLES = (
    "dyexport finetune --model sit-digits --budget 0.5",
    "dyexport finetune --model dit-xl-2 --budget 0.5 --data latents/ --work work/",
    "accelerate launch -m dyexport finetune --work work/",
)


def finetune(
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
    base_precision: options.BasePrecisionOption = None,
    optimizer: options.OptimizerOption = None,
    gradient_checkpointing: options.CheckpointingOption = None,
    micro_batch: options.MicroBatchOption = None,
    tracker: options.TrackerOption = None,
    evaluate_every: options.EvaluateEveryOption = None,
    router: options.RouterOption = None,
    token_router: options.TokenRouterOption = None,
    vae: options.VaeOption = None,
    synthetic: options.SyntheticOption = None,
    seed: options.SeedOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Attach routers to the dense model and train them under the budget: the first stages of a build."""
    settings = settings_of(context)
    with building(settings) as run:
        from dyexport.pipeline.build import finetune_model
        from dyexport.pipeline.training_cost import trainable

        payload: dict[str, Any] = {
            "checkpoint": str(finetune_model(run).dynamic.path),
            "work": str(settings.work),
            **trainable(settings),
            "stages": run.stage_report,
        }
    lines = (("checkpoint", payload["checkpoint"]), *trainable_lines(payload), ("work directory", payload["work"]))
    emit(payload, as_json=json, human=lambda console: console.print(pairs(lines)))
