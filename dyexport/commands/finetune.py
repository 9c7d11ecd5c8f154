"""``dyexport finetune``: the first stages of a build, up to the trained model."""

from __future__ import annotations

import typer

from dyexport.commands.options import BuildOptions, takes_build_options
from dyexport.commands.results import trainable_lines
from dyexport.commands.stages import OF_CALIBRATION, OF_ENGINES, building, checked_settings
from dyexport.console import DebugOption, JsonOption, emit, pairs


@takes_build_options
def finetune(
    options: BuildOptions, context: typer.Context, json: JsonOption = False, debug: DebugOption = False
) -> None:
    """Attach routers to the static model and train them under the budget: build's first stages."""
    settings = checked_settings(options, context, *OF_CALIBRATION, *OF_ENGINES, last="training")
    with building(settings) as pipeline:
        from dyexport.pipeline.stages import trainable

        path, counts = str(pipeline.dynamic.path), trainable(settings)
        payload = {"checkpoint": path, **counts, "stages": pipeline.stage_report}
    lines = (("checkpoint", path), *trainable_lines(payload))
    emit(payload, as_json=json, human=lambda console: console.print(pairs(lines)))
