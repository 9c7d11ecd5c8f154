"""``dyexport build``: a checkpoint to a bundle of slim engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from dyexport.commands import options
from dyexport.commands.results import (
    error_line,
    headroom_lines,
    missed_line,
    next_commands,
    next_lines,
    other_budget_lines,
    other_budgets,
    plan_costs,
    token_path_line,
    trainable_lines,
    unbudgeted_line,
    untrained_line,
)
from dyexport.commands.stages import building, settings_of
from dyexport.console import DebugOption, JsonOption, emit, format_bytes, pairs, stderr

if TYPE_CHECKING:
    from dyexport.pipeline.settings import BuildSettings

EXAMPLES = (
    "dyexport build --model sit-digits --budget 0.5",
    "dyexport build --model dit-xl-2 --budget 0.5 --data latents/ --target onnx,tensorrt-rtx",
    "dyexport build --model flux --budget 0.5 --finetune-steps 0 --lora style.safetensors@0.8",
)


def build(
    context: typer.Context,
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
    engines: options.EnginesOption = None,
    target: options.BuildTargetOption = None,
    precision: options.PrecisionOption = None,
    quantize: options.QuantizeOption = None,
    out: options.OutOption = None,
    work: options.WorkOption = None,
    compute_capability: options.ComputeCapabilityOption = None,
    profile: options.ProfileOption = None,
    stream_weights: options.StreamWeightsOption = None,
    tracker: options.TrackerOption = None,
    evaluate_every: options.EvaluateEveryOption = None,
    router: options.RouterOption = None,
    token_router: options.TokenRouterOption = None,
    vae: options.VaeOption = None,
    synthetic: options.SyntheticOption = None,
    token_path: options.TokenPathOption = None,
    baseline: options.BaselineOption = None,
    memory: options.BuildMemoryOption = None,
    seed: options.SeedOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Build a bundle of slim engines from a checkpoint.

    Finished stages are kept in a work directory; the same command resumes after the last one.
    """
    build_bundle(settings_of(context), json)


def build_bundle(settings: BuildSettings, json: bool, without: frozenset[str] = frozenset()) -> None:
    """Build and print the result. Stages in ``without`` must have been done before."""
    with building(settings, without) as run:
        from dyexport.pipeline import build as pipeline
        from dyexport.pipeline.output import replaced_notice

        manifest = pipeline.build_bundle(run)
    work_bytes = sum(file.stat().st_size for file in Path(settings.work).rglob("*") if file.is_file())
    payload = {
        "bundle": str(settings.out),
        "model": settings.preset.name,
        "budget": settings.budget,
        "widths": manifest.widths,
        **plan_costs(manifest.plan),
        "disk_bytes": sum(record.bytes for record in manifest.files.values()),
        "work": str(settings.work),
        "work_bytes": work_bytes,
        **manifest.metrics,
        "flops_ratio": manifest.plan.flops_ratio,
        "budgets": other_budgets(settings.out, manifest),
        "recipe": settings.effective_recipe(),
        "replaced": dict(run.replaced),
        "stages": run.stage_report,
    }

    def show(console: Console) -> None:
        console.print(pairs(_build_lines(payload)))
        if settings.budget is None:
            console.print(unbudgeted_line(settings.routers, payload["flops_ratio"]), soft_wrap=True)
        for line in (missed_line(payload), untrained_line(payload), token_path_line(manifest.plan)):
            if line is not None:
                console.print(line, markup=False, soft_wrap=True)
        console.print(next_lines(payload, next_commands(manifest, settings.checkpoint)), markup=False, soft_wrap=True)

    if run.replaced:
        stderr().print(replaced_notice(settings.out, run.replaced), markup=False, soft_wrap=True)
    emit(payload, as_json=json, human=show)


def _build_lines(payload: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    return (
        ("bundle", payload["bundle"]),
        ("engines", str(payload["engines"])),
        ("widths", payload["widths"]),
        ("attention + MLP FLOPs (lambda)", f"{payload['flops_ratio']:.3f} of dense"),
        ("whole network's FLOPs", f"{payload['network_flops_ratio']:.3f} of dense"),
        ("as executed by these engines", f"{payload['executed_flops_ratio']:.3f} of dense"),
        error_line(payload),
        *trainable_lines(payload),
        *headroom_lines(payload),
        *_quantization_lines(payload),
        *other_budget_lines(payload),
        ("on disk", format_bytes(payload["disk_bytes"])),
        *_plan_lines(payload["stages"]),
    )


def _plan_lines(stages: Mapping[str, Mapping[str, Any]]) -> Sequence[tuple[str, str]]:
    """Return how long each TensorRT plan took to build."""
    return [
        (name, f"{stage['made_in']:.1f} s" + (" (in an earlier run)" if stage["status"] == "reused" else ""))
        for name, stage in sorted(stages.items())
        if "tensorrt" in name and stage["made_in"] is not None
    ]


def _quantization_lines(payload: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    if not (errors := payload["quantization_errors"]):
        return ()
    return (("output error of quantization", f"{min(errors):.1e} to {max(errors):.1e} by segment (relative MSE)"),)
