"""``dyexport export``: the last stages of a build, from a calibrated model to the bundle."""

from __future__ import annotations

import typer

from dyexport.commands.build import build_bundle
from dyexport.commands.options import BuildOptions, takes_build_options
from dyexport.commands.stages import checked_settings
from dyexport.console import DebugOption, JsonOption

BEFORE_EXPORT = frozenset({"static", "synthetic", "dynamic", "calibrate"})


@takes_build_options
def export(options: BuildOptions, context: typer.Context, json: JsonOption = False, debug: DebugOption = False) -> None:
    """Cut a calibrated model into engines: build's last stages, refusing to run those before."""
    build_bundle(checked_settings(options, context), json, without=BEFORE_EXPORT)
