"""Commands that make a bundle: build, its stages one at a time, models, plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from dyexport.commands.building import building
from dyexport.commands.given import Given, OnceEach
from dyexport.commands.options import BuildOptions, takes_build_options
from dyexport.console import DebugOption, JsonOption, emit, format_bytes, pairs

if TYPE_CHECKING:
    from dyexport.bundle.manifest import SegmentPlan
    from dyexport.pipeline.plan_cost import PlanCost
    from dyexport.pipeline.settings import BuildSettings

app = typer.Typer()

BEFORE_EXPORT = frozenset({"static", "synthetic", "dynamic", "calibrate"})
_OF_PLANS = ("engines", "compute_capability", "profile", "stream_weights")
_OF_ENGINES = (*_OF_PLANS, "target", "token_path", "merge_tolerance", "quantize", "no_baseline")
_OF_CALIBRATION = ("precision", "memory")
NARROW = 4.0  # times below the limit of fp16
PLANNED_ENGINES = (1, 2, 4, 8, 16)


@app.command(cls=OnceEach)
@takes_build_options
def build(options: BuildOptions, context: typer.Context, json: JsonOption = False, debug: DebugOption = False) -> None:
    """Turn a checkpoint into a bundle of slim engines: the whole pipeline, going on where it stopped."""
    _build(_settings(options, context), json)


@app.command(cls=OnceEach)
@takes_build_options
def finetune(
    options: BuildOptions, context: typer.Context, json: JsonOption = False, debug: DebugOption = False
) -> None:
    """Attach routers to the static model and train them under the budget: build's first stages."""
    settings = _settings(options, context, *_OF_CALIBRATION, *_OF_ENGINES, last="training")
    with building(settings) as pipeline:
        from dyexport.pipeline.stages import count_trainable

        path, counts = str(pipeline.dynamic.path), count_trainable(settings)
        payload = {"checkpoint": path, **counts, "stages": pipeline.stage_report}
    lines = (("checkpoint", path), *_trainable_lines(payload))
    emit(payload, as_json=json, human=lambda console: console.print(pairs(lines)))


@app.command(cls=OnceEach)
@takes_build_options
def calibrate(
    options: BuildOptions, context: typer.Context, json: JsonOption = False, debug: DebugOption = False
) -> None:
    """Meet the budget and read widths and token counts off the routers: build's stages up to there."""
    settings = _settings(options, context, *_OF_ENGINES, last="calibration")
    with building(settings) as pipeline:
        payload = {"checkpoint": str(pipeline.calibrated.path), **pipeline.metrics, "stages": pipeline.stage_report}
    emit(payload, as_json=json, human=lambda console: console.print(pairs(_calibration_lines(payload))))


@app.command(cls=OnceEach)
@takes_build_options
def export(options: BuildOptions, context: typer.Context, json: JsonOption = False, debug: DebugOption = False) -> None:
    """Cut a calibrated model into engines: build's last stages, refusing to run those before."""
    _build(_settings(options, context), json, without=BEFORE_EXPORT)


def _settings(options: BuildOptions, context: typer.Context, *unused: str, last: str = "") -> BuildSettings:
    """Checked; refuses the options that only stages after the ``last`` one of this command read."""
    given = Given(context)
    given.refuse(True, f"this command ends with {last}", *unused)
    given.refuse(bool(last) and options.work is not None, "no bundle is written, and --work holds the rest", "out")
    settings = options.settings()
    taken = f"{settings.checkpoint} has routers already and is taken as it is"
    given.refuse(settings.routers == "given", taken, "router", "td_lora", "finetune_steps")
    given.refuse(settings.routers == "none", "with --finetune-steps 0 every token runs", "token_path")
    return settings


def _build(settings: BuildSettings, json: bool, without: frozenset[str] = frozenset()) -> None:
    with building(settings, without) as pipeline:
        manifest = pipeline.bundle()
    payload = {
        "bundle": str(settings.out),
        "model": settings.model,
        "budget": settings.budget,
        **_costs(manifest.plan),
        "disk_bytes": sum(record.bytes for record in manifest.files.values()),
        **manifest.metrics,
        "flops_ratio": manifest.plan.flops_ratio,
        "stages": pipeline.stage_report,
    }
    emit(payload, as_json=json, human=lambda console: console.print(pairs(_build_lines(payload))))


@app.command(cls=OnceEach)
@takes_build_options
def plan(
    options: BuildOptions,
    context: typer.Context,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what K = 1, 2, 4, 8, 16 engines would cost. Calibrates if that is not done, but never trains."""
    settings = _settings(options, context, *_OF_PLANS, last="prices of several K")
    with building(settings, without=settings.slow_stages) as pipeline:
        plans = [pipeline.priced(engines) for engines in PLANNED_ENGINES]
        rows = [{**_costs(found), "tensorrt": _predictions(pipeline.predicted(found))} for found in plans]
    formats = {"precision": settings.stored_precision, "quantization": settings.quantize}
    payload = {"model": options.model, **formats, "plans": rows}
    emit(payload, as_json=json, human=lambda console: console.print(_plan_table(rows)))


@app.command(cls=OnceEach)
def models(
    targets: Annotated[
        bool, typer.Option("--targets", help="List engine formats instead, and what proves them.")
    ] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List the models known by name, or the formats that --target takes."""
    if targets:
        from dyexport.pipeline.targets import TARGETS

        shown = ("about", "proof", "quantized")
        found = [{"name": name, **{part: getattr(each, part) for part in shown}} for name, each in TARGETS.items()]
        emit({"targets": found}, as_json=json, human=lambda console: console.print(_target_table(found)))
        return
    from dyexport.flops import FlopsModel
    from dyexport.presets import PRESETS

    rows = [
        {
            "name": preset.name,
            "parameters": preset.parameters,
            "gflops": FlopsModel.of_preset(preset).dense / 1e9,
            "tokens": preset.tokens,
            "objective": preset.objective,
            "weights": preset.hub_id,
            "about": preset.about,
        }
        for preset in PRESETS.values()
    ]
    emit({"models": rows}, as_json=json, human=lambda console: console.print(_model_table(rows)))


def _costs(found: SegmentPlan) -> dict[str, Any]:
    values = found.model_dump(exclude={"segments"})
    return {"engines": len(found.segments), **values}


def _predictions(found: Mapping[str, PlanCost]) -> dict[str, dict[str, Any]]:
    return {target: asdict(cost) for target, cost in found.items()}


def _build_lines(payload: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    return (
        ("bundle", payload["bundle"]),
        ("engines", str(payload["engines"])),
        ("attention + MLP FLOPs (lambda)", f"{payload['flops_ratio']:.3f} of dense"),
        ("whole network's FLOPs", f"{payload['network_flops_ratio']:.3f} of dense"),
        ("as executed by these engines", f"{payload['executed_flops_ratio']:.3f} of dense"),
        ("output error against dense", f"{payload['output_relative_mse']:.4f} (relative MSE)"),
        *_trainable_lines(payload),
        *_headroom_lines(payload),
        *_quantization_lines(payload),
        ("on disk", format_bytes(payload["disk_bytes"])),
        *_plan_lines(payload["stages"]),
    )


def _plan_lines(stages: Mapping[str, Mapping[str, Any]]) -> Sequence[tuple[str, str]]:
    """What each TensorRT plan took, when it was made."""
    made = {name: stage for name, stage in stages.items() if "tensorrt" in name}
    return [
        (name, f"{stage['made_in']:.1f} s" + (", before" if stage["status"] == "reused" else ""))
        for name, stage in sorted(made.items())
        if stage["made_in"] is not None
    ]


def _headroom_lines(payload: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """Calibration does not see every input: a narrow margin is worth a warning."""
    if "fp16_headroom" not in payload:
        return ()
    warning = "; an input not seen may overflow, bf16 will not" if payload["fp16_headroom"] < NARROW else ""
    return (("largest value in fp16", f"{payload['fp16_headroom']:.1f} x below the limit{warning}"),)


def _quantization_lines(payload: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    if not (errors := payload["quantization_errors"]):
        return ()
    return (("output error of quantization", f"{min(errors):.1e} to {max(errors):.1e} by segment (relative MSE)"),)


def _calibration_lines(payload: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    return (
        ("checkpoint", payload["checkpoint"]),
        ("attention + MLP FLOPs (lambda)", f"{payload['flops_ratio']:.3f} of dense"),
        ("output error against dense", f"{payload['output_relative_mse']:.4f} (relative MSE)"),
        *_trainable_lines(payload),
        *_headroom_lines(payload),
    )


def _trainable_lines(payload: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    if "trainable_parameters" not in payload:
        return ()
    count, share = payload["trainable_parameters"], payload["trainable_share"]
    return (("trained", f"{count:,.0f} parameters ({100 * share:.2f} % of full fine-tuning's)"),)


def _plan_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("engines", "lambda", "network FLOPs", "executed FLOPs", "disk", "resident", "resident, shared")
    targets = list(rows[0]["tensorrt"])
    for target in targets:
        table.add_column(f"{target} plans")
    for row in rows:
        ratios = (f"{row[name]:.3f}" for name in ("flops_ratio", "network_flops_ratio", "executed_flops_ratio"))
        sizes = (format_bytes(row[name]) for name in ("disk_bytes", "resident_bytes", "disk_bytes"))
        plans = (_plan_cost(row["tensorrt"][target]) for target in targets)
        table.add_row(str(row["engines"]), *ratios, *sizes, *plans)
    return table


def _plan_cost(cost: Mapping[str, Any]) -> str:
    """Of weights alone, and seconds only where plans of this work directory tell."""
    time = f"{cost['seconds']:.0f} s" if cost["seconds"] is not None else "time unknown, none was built here"
    return f"{format_bytes(cost['bytes'])} of weights, {time}"


def _target_table(rows: Sequence[Mapping[str, str]]) -> Table:
    table = Table("target", "writes", "proof", "with --quantize")
    for row in rows:
        table.add_row(*row.values())
    return table


def _model_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("model", "parameters", "GFLOPs", "tokens", "objective", "weights on the hub")
    for row in rows:
        size, flops = f"{row['parameters'] / 1e6:.1f} M", f"{row['gflops']:.2f}"
        table.add_row(row["name"], size, flops, str(row["tokens"]), row["objective"], row["weights"] or "-")
    return table
