"""``dyexport verify``: a bundle against the masked torch model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dyexport.commands import options
from dyexport.commands.bundles import open_bundle
from dyexport.console import DebugOption, JsonOption, chatter_on_stderr, emit, pairs, progress_bar

EXAMPLES = (
    "dyexport verify sit-digits-0.5",
    "dyexport verify flux-0.5 --small --layers",
    "dyexport verify dit-xl-2-0.5 --target tensorrt-rtx --timesteps 16",
)


def verify(
    bundle: options.BundleArgument,
    timesteps: Annotated[int, typer.Option(help="Number of random timesteps to compare at.", metavar="N")] = 64,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest accepted error. Default: 1e-4 absolute in fp32, 1e-2 relative in fp16, 8e-2 in bf16; for "
            "int8 and fp8 twice the error of quantization.",
            metavar="ERROR",
        ),
    ] = None,
    target: options.TargetOption = "onnx",
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Dynamic checkpoint to compare with. Default: the one that the bundle was built from.", metavar="DIR"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of timesteps and inputs.", metavar="N")] = 0,
    layers: Annotated[
        bool,
        typer.Option(
            "--layers", help="Also compare every layer of the ONNX graphs and name the first to drift.", metavar=""
        ),
    ] = False,
    small: Annotated[
        bool,
        typer.Option(
            "--small",
            help="Compare on small pictures, for models of any size; on a CPU full size takes minutes per pass.",
            metavar="",
        ),
    ] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare a bundle with the masked torch model that it was cut from, at random timesteps."""
    from dyexport.verification.settings import VerifySettings, reference_of

    settings = VerifySettings(
        timesteps=timesteps, tolerance=tolerance, target=target, seed=seed, layers=layers, small=small
    )
    opened = open_bundle(bundle, target)
    settings.check_for(opened)
    reference_of(opened, reference)
    with chatter_on_stderr(), progress_bar("verifying") as advance:
        from dyexport.verification.verify import verify_bundle

        report = verify_bundle(bundle, settings, reference=reference, progress=advance)
    payload = report.as_json()
    emit(payload, as_json=json, human=lambda console: console.print(pairs(_verify_lines(payload))))
    if not report.passed:
        raise typer.Exit(1)


def _verify_lines(payload: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    error = payload["error"]
    unit = "largest error" if payload["quantization"] is None else "largest error over that of quantization"
    return (
        ("result", "passed" if payload["passed"] else "FAILED"),
        (unit, "not a number" if error is None else f"{error:.2e} (at most {payload['tolerance']:g})"),
        ("precision", payload["precision"]),
        *_quantized_lines(payload),
        ("timesteps compared", f"{payload['timesteps']}"),
        ("skipped, tokens over capacity", f"{payload['overflow']}"),
        ("resampled, a token on its threshold", f"{payload['redrawn']}"),
        *_layer_lines(payload["layers"]),
    )


def _quantized_lines(payload: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """Return the format of quantized layers and the error against the unquantized model."""
    if payload["quantization"] is None:
        return ()
    error = payload["relative_error"]
    shown = "not a number" if error is None else f"{error:.2e}"
    return (("linear layers in", payload["quantization"]), ("largest relative error, unquantized", shown))


def _layer_lines(layers: Mapping[str, Any] | None) -> Sequence[tuple[str, str]]:
    """Return the first layer to drift, or the one with the largest error."""
    if layers is None:
        return ()
    compared = ("layers compared", f"{len(layers['layers'])} ({layers['unmatched']} tensors not compared: not unique)")
    if (first := layers["first_drift"]) is not None:
        return compared, ("first to drift", f"{first['module']} of {first['network']}: {_layer_error(first)}")
    worst = max(layers["layers"], key=lambda layer: layer["relative_error"])
    return compared, ("largest error of a layer", f"{_layer_error(worst)}: {worst['module']} of {worst['network']}")


def _layer_error(layer: Mapping[str, Any]) -> str:
    if layer["max_abs_error"] is None:
        return "not a number"
    return f"{layer['max_abs_error']:.2e}, relative {layer['relative_error']:.2e}"
