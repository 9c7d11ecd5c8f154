"""``dyexport doctor``: what this machine is, and which targets and engines run on it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from dyexport.console import DebugOption, JsonOption, chatter_on_stderr, emit, format_bytes, pairs

if TYPE_CHECKING:
    from dyexport.bundle.reader import Bundle
    from dyexport.doctor.bundles import EngineFit
    from dyexport.doctor.diagnosis import Diagnosis
    from dyexport.doctor.machine import Accelerators, Host
    from dyexport.doctor.targets import Verdict

MOST_HASHED = 2**30  # bytes of a bundle

EXAMPLES = (
    "dyexport doctor",
    "dyexport doctor flux-0.5",
    "dyexport doctor --json | jq '.targets[] | select(.device != null) | .target'",
)


def doctor(
    bundle: Annotated[
        Path | None, typer.Argument(help="Also tell which engines of this bundle run here.", metavar="BUNDLE")
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what this machine is, which targets run on it, and what the others lack.

    Exits with 0 if a target runs here, and with a bundle if one of its engines does; else with 1.
    """
    from dyexport.doctor.machine import find_host
    from dyexport.doctor.probing import Findings

    opened, hashed = (None, None) if bundle is None else _opened(bundle)
    findings = Findings()
    host = find_host(findings)
    if not json:  # before torch is imported, which takes seconds
        Console(highlight=False).print("Machine", pairs(list(_host_lines(host))))
    with chatter_on_stderr():
        from dyexport.doctor.diagnosis import diagnose

        diagnosis = diagnose(host, findings, opened, bundle, hashed)
    emit(diagnosis.as_json(), as_json=json, human=_printer(diagnosis, bundle))
    if not diagnosis.passed:
        raise typer.Exit(1)


def _opened(path: Path) -> tuple[Bundle, bool]:
    """Open a bundle; return whether its files were hashed, which large ones are not: that takes minutes.

    Raises ``BundleError`` for a damaged bundle.
    """
    from dyexport.bundle.reader import Bundle

    bundle = Bundle.open(path, check_hashes=False)
    if sum(record.bytes for record in bundle.manifest.files.values()) > MOST_HASHED:
        return bundle, False
    return Bundle.open(path), True


def _printer(diagnosis: Diagnosis, bundle: Path | None) -> Callable[[Console], None]:
    def show(console: Console) -> None:
        def lines(*texts: str) -> None:
            console.print(*texts, sep="\n", markup=False, soft_wrap=True)

        lines("", "Accelerators, as torch and ONNX Runtime see them")
        console.print(pairs(list(_accelerator_lines(diagnosis.machine.accelerators))))
        lines("", "Targets", *(line for verdict in diagnosis.targets for line in _target_lines(verdict)))
        if diagnosis.bundle is not None:
            lines("", f"Engines of {bundle}", *(line for fit in diagnosis.bundle for line in _fit_lines(fit)))
        if diagnosis.hashed is False:
            cure = f"dyexport verify {shlex.quote(str(bundle))}"
            lines("  The contents of its files were not checked, since they are large; this does it:", f"      {cure}")
        if diagnosis.problems:
            lines("", "Probes that failed", *(f"  {name}: {why}" for name, why in diagnosis.problems.items()))

    return show


def _host_lines(host: Host) -> Iterator[tuple[str, str]]:
    yield "system", host.system
    if (jetson := host.jetson) is not None:
        release = f"Jetson Linux {jetson.l4t}, JetPack {jetson.jetpack or 'unknown'}"
        yield "board", f"{jetson.board or 'unknown'} ({release})"
    yield "CPU", f"{host.cpu or 'unknown'}, {host.cores or 'unknown number of'} cores"
    yield "memory", f"{_size(host.memory)}, {_size(host.free_memory)} free"
    yield "NVIDIA driver", host.driver or "none"
    yield "compiler", host.compiler or "no g++"
    yield "Python", host.python
    for name, version in host.packages.items():
        yield name, version or "not installed"


def _accelerator_lines(accelerators: Accelerators) -> Iterator[tuple[str, str]]:
    yield "CPU capability", accelerators.cpu_capability or "unknown"
    kernels = f", kernels for {', '.join(accelerators.kernels)}" if accelerators.kernels else ""
    yield "CUDA of torch", f"{accelerators.cuda or 'none'}{kernels}"
    for index, gpu in enumerate(accelerators.gpus):
        memory = f"{_size(gpu.memory)}, {_size(gpu.free_memory)} free"
        yield f"cuda:{index}", f"{gpu.name}, compute capability {gpu.compute_capability}, {memory}"
    providers = accelerators.providers
    yield "ONNX Runtime's providers", "none" if providers is None else ", ".join(providers)


def _target_lines(verdict: Verdict) -> Iterator[str]:
    """Yield what runs where, what is missing, and each command on a separate line to copy."""
    runs = "does not run" if verdict.device is None else f"runs on {verdict.device}"
    compiles = "; can be compiled here" if verdict.device is None and verdict.compiles else ""
    needs = "; ".join(need.what for need in verdict.needs)
    yield f"  {verdict.target}: {runs}{compiles}{f'; missing: {needs}' if needs else ''}"
    yield from (f"      {need.install}" for need in verdict.needs if need.install is not None)


def _fit_lines(fit: EngineFit) -> Iterator[str]:
    runs = f"{fit.fitting} of {fit.engines} run" if fit.engines else None
    yield f"  {fit.target}: {'; '.join(filter(None, (runs, fit.reason)))}"
    if fit.weight_bytes is not None:
        least = f"{_size(fit.weight_bytes)} of weights, {_size(fit.least_bytes)} with one engine at a time"
        short = "; too little" if fit.fits_in_memory is False else ""
        yield f"      {least}; {_size(fit.free_bytes)} free{short}"
    if fit.compile is not None:
        yield f"      {fit.compile}"


def _size(count: int | None) -> str:
    return "unknown" if count is None else format_bytes(count)
