"""Commands that make a bundle: build, its stages one at a time, models, plan, verify."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from dyexport.commands.building import building
from dyexport.commands.options import BuildOptions, takes_build_options
from dyexport.console import (
    DebugOption,
    JsonOption,
    chatter_on_stderr,
    emit,
    format_bytes,
    progress_bar,
)

if TYPE_CHECKING:
    from dyexport.build.predictions import PlanCost
    from dyexport.build.settings import BuildSettings
    from dyexport.bundle import SegmentPlan

app = typer.Typer()

BEFORE_EXPORT = frozenset({"static", "synthetic", "dynamic", "calibrate"})
NARROW = 4.0  # times below the limit of fp16
PLANNED_ENGINES = (1, 2, 4, 8, 16)


@app.command()
@takes_build_options
def build(options: BuildOptions, json: JsonOption = False, debug: DebugOption = False) -> None:
    """Turn a checkpoint into a bundle of slim engines: the whole pipeline, going on where it stopped."""
    _build(options.settings(), json)


@app.command()
@takes_build_options
def finetune(options: BuildOptions, json: JsonOption = False, debug: DebugOption = False) -> None:
    """Attach routers to the static model and train them under the budget: build's first stages."""
    settings = options.settings()
    with building(settings) as pipeline:
        from dyexport.build.stages import count_trainable

        path, counts = str(pipeline.dynamic.path), count_trainable(settings)
        payload = {"checkpoint": path, **counts, "stages": pipeline.stage_report}
    lines = (("checkpoint", path), *_trainable_lines(payload))
    emit(payload, as_json=json, human=lambda console: console.print(_pairs(lines)))


@app.command()
@takes_build_options
def calibrate(options: BuildOptions, json: JsonOption = False, debug: DebugOption = False) -> None:
    """Meet the budget and read widths and token counts off the routers: build's stages up to there."""
    with building(options.settings()) as pipeline:
        payload = {"checkpoint": str(pipeline.calibrated.path), **pipeline.metrics, "stages": pipeline.stage_report}
    emit(payload, as_json=json, human=lambda console: console.print(_pairs(_calibration_lines(payload))))


@app.command()
@takes_build_options
def export(options: BuildOptions, json: JsonOption = False, debug: DebugOption = False) -> None:
    """Cut a calibrated model into engines: build's last stages, refusing to run those before."""
    _build(options.settings(), json, without=BEFORE_EXPORT)


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
    emit(payload, as_json=json, human=lambda console: console.print(_pairs(_build_lines(payload))))


@app.command()
@takes_build_options
def plan(
    options: BuildOptions,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what K = 1, 2, 4, 8, 16 engines would cost, before any is exported. Calibrates first if that is not done."""
    with building(options.settings()) as pipeline:
        plans = [pipeline.priced(engines) for engines in PLANNED_ENGINES]
        rows = [{**_costs(found), "tensorrt": _predictions(pipeline.predicted(found))} for found in plans]
    emit({"model": options.model, "plans": rows}, as_json=json, human=lambda console: console.print(_plan_table(rows)))


@app.command()
def models(
    targets: Annotated[
        bool, typer.Option("--targets", help="List engine formats instead, and what proves them.")
    ] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List the models known by name, or the formats that --target takes."""
    if targets:
        from dyexport.build.targets import TARGETS

        found = [{"name": name, "about": each.about, "proof": each.proof} for name, each in TARGETS.items()]
        emit({"targets": found}, as_json=json, human=lambda console: console.print(_target_table(found)))
        return
    from dyexport.presets import PRESETS
    from dyexport.slicing.flops import FlopsModel

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


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle directory.")],
    timesteps: Annotated[int, typer.Option(help="How many random timesteps to compare at.")] = 64,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest accepted error: absolute in fp32 (1e-4), relative in fp16 (1e-2) and bf16 (8e-2)."),
    ] = None,
    target: Annotated[str, typer.Option(help="Which of the bundle's engine formats to run.")] = "onnx",
    reference: Annotated[
        Path | None, typer.Option(help="The dynamic checkpoint to compare with; by default the one it was built from.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of timesteps and inputs.")] = 0,
    layers: Annotated[
        bool, typer.Option("--layers", help="Also compare every layer of the ONNX graphs, and name the first to drift.")
    ] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare a bundle with the masked torch model it was cut from, in fp32 at random timesteps."""
    from dyexport.build.verify import VerifySettings, verify_bundle

    settings = VerifySettings(timesteps=timesteps, tolerance=tolerance, target=target, seed=seed, layers=layers)
    with chatter_on_stderr(), progress_bar("verifying") as advance:
        report = verify_bundle(bundle, settings, reference=reference, advance=advance)
    payload = report.as_json()
    emit(payload, as_json=json, human=lambda console: console.print(_pairs(_verify_lines(payload))))
    if not report.passed:
        raise typer.Exit(1)


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


def _verify_lines(payload: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    error = payload["error"]
    return (
        ("result", "passed" if payload["passed"] else "FAILED"),
        ("largest error", "not a number" if error is None else f"{error:.2e} (at most {payload['tolerance']:g})"),
        ("precision", payload["precision"]),
        ("timesteps compared", f"{payload['timesteps']}"),
        ("left out, tokens over capacity", f"{payload['overflow']}"),
        ("redrawn, a token on its threshold", f"{payload['redrawn']}"),
        *_layer_lines(payload["layers"]),
    )


def _layer_lines(layers: Mapping[str, Any] | None) -> Sequence[tuple[str, str]]:
    """The first layer to drift, or the one that comes nearest to it."""
    if layers is None:
        return ()
    compared = ("layers compared", f"{len(layers['layers'])}")
    if (first := layers["first_drift"]) is not None:
        return compared, ("first to drift", f"{first['module']} of {first['network']}: {_layer_error(first)}")
    worst = max(layers["layers"], key=lambda layer: layer["relative_error"])
    return compared, ("largest error of a layer", f"{_layer_error(worst)}: {worst['module']} of {worst['network']}")


def _layer_error(layer: Mapping[str, Any]) -> str:
    if layer["max_abs_error"] is None:
        return "not a number"
    return f"{layer['max_abs_error']:.2e}, relative {layer['relative_error']:.2e}"


def _pairs(lines: Sequence[tuple[str, str]]) -> Table:
    table = Table(show_header=False, box=None)
    for name, value in lines:
        table.add_row(name, value)
    return table


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
    table = Table("target", "writes", "proof")
    for row in rows:
        table.add_row(row["name"], row["about"], row["proof"])
    return table


def _model_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("model", "parameters", "GFLOPs", "tokens", "objective", "weights on the hub")
    for row in rows:
        size, flops = f"{row['parameters'] / 1e6:.1f} M", f"{row['gflops']:.2f}"
        table.add_row(row["name"], size, flops, str(row["tokens"]), row["objective"], row["weights"] or "-")
    return table
