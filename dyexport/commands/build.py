"""``dyexport build``: a checkpoint to a bundle of slim engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from dyexport.commands.options import BuildOptions, takes_build_options
from dyexport.commands.results import headroom_lines, plan_costs, trainable_lines
from dyexport.commands.stages import building, checked_settings
from dyexport.console import DebugOption, JsonOption, emit, format_bytes, pairs

if TYPE_CHECKING:
    from dyexport.pipeline.settings import BuildSettings


@takes_build_options
def build(options: BuildOptions, context: typer.Context, json: JsonOption = False, debug: DebugOption = False) -> None:
    """Turn a checkpoint into a bundle of slim engines: the whole pipeline, going on where it stopped."""
    build_bundle(checked_settings(options, context), json)


def build_bundle(settings: BuildSettings, json: bool, without: frozenset[str] = frozenset()) -> None:
    with building(settings, without) as pipeline:
        manifest = pipeline.bundle()
    payload = {
        "bundle": str(settings.out),
        "model": settings.model,
        "budget": settings.budget,
        **plan_costs(manifest.plan),
        "disk_bytes": sum(record.bytes for record in manifest.files.values()),
        **manifest.metrics,
        "flops_ratio": manifest.plan.flops_ratio,
        "stages": pipeline.stage_report,
    }
    emit(payload, as_json=json, human=lambda console: console.print(pairs(_build_lines(payload))))


def _build_lines(payload: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    return (
        ("bundle", payload["bundle"]),
        ("engines", str(payload["engines"])),
        ("attention + MLP FLOPs (lambda)", f"{payload['flops_ratio']:.3f} of dense"),
        ("whole network's FLOPs", f"{payload['network_flops_ratio']:.3f} of dense"),
        ("as executed by these engines", f"{payload['executed_flops_ratio']:.3f} of dense"),
        ("output error against dense", f"{payload['output_relative_mse']:.4f} (relative MSE)"),
        *trainable_lines(payload),
        *headroom_lines(payload),
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


def _quantization_lines(payload: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    if not (errors := payload["quantization_errors"]):
        return ()
    return (("output error of quantization", f"{min(errors):.1e} to {max(errors):.1e} by segment (relative MSE)"),)
