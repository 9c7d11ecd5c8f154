"""``dyexport export``: the last stages of a build, from a calibrated model to the bundle."""

from __future__ import annotations

import typer

from dyexport.commands import options
from dyexport.commands.build import build_bundle
from dyexport.commands.stages import settings_of
from dyexport.console import DebugOption, JsonOption

EXAMPLES = (
    "dyexport export --work work/",
    "dyexport export --work work/ --engines 8 --out bundle-8",
    "dyexport export --work work/ --target onnx,tensorrt-rtx --compute-capability 8.9,12.0",
)

BEFORE_EXPORT = frozenset({"encoded", "static", "synthetic", "dynamic", "calibrate"})


def export(
    context: typer.Context,
    work: options.RecordedWorkOption,
    engines: options.EnginesOption = None,
    target: options.BuildTargetOption = None,
    quantize: options.QuantizeOption = None,
    out: options.OutOption = None,
    compute_capability: options.ComputeCapabilityOption = None,
    profile: options.ProfileOption = None,
    stream_weights: options.StreamWeightsOption = None,
    token_path: options.TokenPathOption = None,
    baseline: options.BaselineOption = None,
    memory: options.BuildMemoryOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Cut a calibrated model into engines and write the bundle: the last stages of a build.

    Never trains or calibrates. Options that are not given are those of the earlier stages.
    """
    build_bundle(settings_of(context), json, without=BEFORE_EXPORT)
