"""``dyexport calibrate``: the stages of a build up to widths and token counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import typer

from dyexport.commands.options import BuildOptions, takes_build_options
from dyexport.commands.results import headroom_lines, trainable_lines
from dyexport.commands.stages import OF_ENGINES, building, checked_settings
from dyexport.console import DebugOption, JsonOption, emit, pairs


@takes_build_options
def calibrate(
    options: BuildOptions, context: typer.Context, json: JsonOption = False, debug: DebugOption = False
) -> None:
    """Meet the budget and read widths and token counts off the routers: build's stages up to there."""
    settings = checked_settings(options, context, *OF_ENGINES, last="calibration")
    with building(settings) as pipeline:
        payload = {"checkpoint": str(pipeline.calibrated.path), **pipeline.metrics, "stages": pipeline.stage_report}
    emit(payload, as_json=json, human=lambda console: console.print(pairs(_calibration_lines(payload))))


def _calibration_lines(payload: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    return (
        ("checkpoint", payload["checkpoint"]),
        ("attention + MLP FLOPs (lambda)", f"{payload['flops_ratio']:.3f} of dense"),
        ("output error against dense", f"{payload['output_relative_mse']:.4f} (relative MSE)"),
        *trainable_lines(payload),
        *headroom_lines(payload),
    )
