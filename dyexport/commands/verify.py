"""``dyexport verify``: a bundle against its golden data, and against the masked torch model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dyexport.commands import options
from dyexport.commands.bundles import at_budget, open_bundle
from dyexport.console import DebugOption, JsonOption, chatter_on_stderr, emit, pairs, progress_bar
from dyexport.errors import UsageError

EXAMPLES = (
    "dyexport verify sit-digits-0.5",
    "dyexport verify flux-0.5 --small --layers",
    "dyexport verify dit-xl-2-0.5 --target tensorrt-rtx --device cuda",
)


def verify(
    bundle: options.BundleArgument,
    budget: options.BundleBudgetOption = None,
    timesteps: Annotated[
        int | None,
        typer.Option(help="Number of random timesteps to compare with the reference at. Default: 64.", metavar="N"),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest accepted error. Default: 1e-4 absolute in fp32, 1e-2 relative in fp16, 8e-2 in bf16; for "
            "int8 and fp8 twice the error of quantization.",
            metavar="ERROR",
        ),
    ] = None,
    target: options.TargetOption = "onnx",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N. Default: CUDA where it is available.", metavar="DEVICE")
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Dynamic checkpoint to compare with. Default: the one that the bundle was built from, if it is there.",
            metavar="DIR",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of random timesteps and their inputs. Default: 0.", metavar="N")
    ] = None,
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
    """Compare a bundle with its golden data, and with the masked torch model that it was cut from.

    Golden data is in the bundle: inputs, and the masked model's outputs. It needs nothing else. Where the bundle was
    built, the model itself is run at random timesteps, too. Of a bundle of several budgets, all are compared.
    """
    from dyexport.verification.settings import VerifySettings, check_reference

    settings = VerifySettings(
        timesteps=timesteps, tolerance=tolerance, target=target, device=device, seed=seed, layers=layers, small=small
    )
    roots = _roots(bundle, budget)
    if reference is not None and len(roots) > 1:
        raise UsageError(f"--reference is of one budget, and {bundle} has {', '.join(roots)}; give --budget too")
    for root in roots.values():
        opened = open_bundle(root, target)
        settings.check_for(opened)
        check_reference(opened, settings, reference)
    payloads = {}
    for name, root in roots.items():
        with chatter_on_stderr(), progress_bar("verifying" if len(roots) == 1 else f"budget {name}") as advance:
            from dyexport.verification.verify import verify_bundle

            payloads[name] = verify_bundle(root, settings, reference=reference, progress=advance).as_json()
    first, passed = next(iter(payloads.values())), all(payload["passed"] for payload in payloads.values())

    def show(console: Console) -> None:
        for name, payload in payloads.items():
            lines = _verify_lines(payload)
            console.print(pairs(lines if len(payloads) == 1 else (("budget", name), *lines)))

    emit(first if len(payloads) == 1 else {"passed": passed, "budgets": payloads}, as_json=json, human=show)
    if not passed:
        raise typer.Exit(1)


def _roots(bundle: Path, budget: float | None) -> dict[str, Path]:
    """Return what to verify, by budget: all of a bundle of several, unless one of them is given."""
    from dyexport.bundle.manifest_file import MANIFEST, read_manifest

    manifest = read_manifest((root := at_budget(bundle, budget)) / MANIFEST)
    if budget is not None or manifest.folder is not None or not manifest.budgets:
        return {f"{manifest.budget or ''}": root}
    return {f"{each:g}": at_budget(bundle, each) for each in manifest.budgets}


def _verify_lines(payload: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    unit = "largest error" if payload["quantization"] is None else "largest error over that of quantization"
    error = _nothing(payload) or f"{_error(payload['error'])} (at most {payload['tolerance']:g})"
    return (
        ("result", "passed" if payload["passed"] else "FAILED"),
        (unit, error),
        ("precision", payload["precision"]),
        *_quantized_lines(payload),
        ("target", f"{payload['target']} on {payload['device']}"),
        ("reference", payload["reference"] or _no_reference(payload)),
        *_golden_lines(payload["golden"]),
        ("timesteps compared", f"{payload['timesteps']}"),
        ("wrong gates of the width table", f"{payload['wrong_gates']} of {payload['gates']}"),
        ("skipped, tokens over capacity", f"{payload['overflow']}"),
        ("resampled, a token on its threshold", f"{payload['redrawn']}"),
        *_layer_lines(payload["layers"]),
        *((_interval(segment), _of_segment(segment)) for segment in payload["segments"]),
    )


def _no_reference(payload: Mapping[str, Any]) -> str:
    return f"none: {payload['no_reference']}, so the bundle was compared with its golden data"


def _nothing(payload: Mapping[str, Any]) -> str | None:
    """Return the reason if there is no error because nothing was compared."""
    skipped = payload["overflow"] == payload["timesteps"]
    return "nothing compared: all inputs keep more tokens than a capacity holds" if skipped else None


def _error(error: float | None) -> str:
    return "not a number" if error is None else f"{error:.2e}"


def _golden_lines(golden: Mapping[str, Any] | None) -> Sequence[tuple[str, str]]:
    """Return sizes and errors of the comparison with golden data."""
    if golden is None:
        return (("golden data", "none: an older dyexport built this bundle"),)
    text = f" and {golden['text_tokens']} of text" if golden["text_tokens"] else ""
    inputs = f"{golden['source']}, batch {golden['batch']}, {golden['tokens']} tokens{text}"
    error = f"{_error(golden['error'])} at {golden['timesteps']} timesteps"
    lines = [("golden data", error), ("golden inputs", inputs)]
    if golden["wrong_gates"]:
        lines.append(("wrong gates at golden timesteps", f"{golden['wrong_gates']} of {golden['gates']}"))
    if golden["dense_compared"]:
        lines.append(("dense network, golden data", _error(golden["dense_error"])))
    return lines


def _interval(segment: Mapping[str, Any]) -> str:
    return f"segment {segment['segment']}, t from {segment['start']:.4g} to {segment['end']:.4g}"


def _of_segment(segment: Mapping[str, Any]) -> str:
    if not segment["compared"]:
        return "not compared"
    count = segment["compared"]
    return f"{_error(segment['error'])} at {count} timestep{'s' if count > 1 else ''}"


def _quantized_lines(payload: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """Return the format of quantized layers and the error against the unquantized model."""
    if payload["quantization"] is None:
        return ()
    shown = _error(payload["relative_error"])
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
