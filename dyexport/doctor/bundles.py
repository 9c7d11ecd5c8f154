"""Which engines of a bundle fit this machine, how large their weights are, and how to make the others."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dyexport.bundle.manifest import CONDITIONING
from dyexport.bundle.plan import segment_name
from dyexport.bundle.reader import Bundle
from dyexport.doctor.probing import Findings, explain
from dyexport.doctor.targets import Machine, Verdict
from dyexport.engines.registry import EngineOptions, engine_files, get_backend, make_engines

NOT_COMPILED = "onnx"  # the graphs that every bundle has


@dataclass(frozen=True, kw_only=True)
class EngineFit:
    """Whether a bundle's engines of one target run here.

    ``engines`` is how many there are, ``fitting`` how many run; the rest do not for ``reason``. ``weight_bytes`` is of
    all engines together, ``least_bytes`` of the largest one and the conditioning: what has to be in memory at a time.
    ``free_bytes`` is the free memory of ``device``. ``compile`` is the command that makes engines for this machine.
    """

    target: str
    device: str | None
    engines: int
    fitting: int
    reason: str | None
    weight_bytes: int | None
    least_bytes: int | None
    free_bytes: int | None
    compile: str | None

    @property
    def runs(self) -> bool:
        return self.fitting > 0

    @property
    def fits_in_memory(self) -> bool | None:
        """Whether one engine at a time fits; None where a size is unknown."""
        if self.least_bytes is None or self.free_bytes is None:
            return None
        return self.least_bytes <= self.free_bytes


def fit_bundle(
    bundle: Bundle, path: Path, verdicts: tuple[Verdict, ...], machine: Machine, findings: Findings
) -> tuple[EngineFit, ...]:
    """Judge the engines of every target: those that the bundle holds, and those that it could."""
    return tuple(_fit(bundle, path, verdict, machine, findings) for verdict in verdicts)


def _fit(bundle: Bundle, path: Path, verdict: Verdict, machine: Machine, findings: Findings) -> EngineFit:
    target = verdict.target
    paths = findings.attempt(target, lambda: _paths(bundle, target)) or []
    reasons = [_reason(bundle, verdict, each) for each in paths]
    fitting = reasons.count(None)
    device = findings.attempt(f"device of {target}", lambda: _device(verdict, paths)) or verdict.device
    sizes = findings.attempt(f"weights of {target}", lambda: _sizes(target, paths, device)) if paths else None
    makeable = target != NOT_COMPILED and verdict.device is not None and fitting < max(len(paths), 1)
    return EngineFit(
        target=target,
        device=device,
        engines=len(paths),
        fitting=fitting,
        reason=next(filter(None, reasons), None) if paths else "the bundle has no such engines",
        weight_bytes=None if sizes is None else sizes.together,
        least_bytes=None if sizes is None else sizes.least,
        free_bytes=_free(device, machine),
        compile=f"dyexport compile {shlex.quote(str(path))} --target {target}" if makeable else None,
    )


def _paths(bundle: Bundle, target: str) -> list[Path]:
    """Return the engine files that sampling uses, the conditioning last; none if the bundle lacks the target."""
    files = engine_files(target)
    if files not in {engine.target for engine in bundle.manifest.engines}:
        return []
    found = bundle.engine_paths(files)
    segments = (segment_name(index) for index in range(len(bundle.manifest.plan.segments)))
    return [found[network] for network in (*segments, CONDITIONING)]


def _reason(bundle: Bundle, verdict: Verdict, path: Path) -> str | None:
    """Explain why an engine does not run here; None if it does."""
    if verdict.device is None:
        return f"{verdict.target} does not run here"
    if verdict.target == "onnx" and verdict.device == "cpu" and bundle.manifest.model.precision == "bf16":
        return "ONNX Runtime has no CPU kernels for bf16"
    try:
        return get_backend(verdict.target).incompatibility(path)
    except Exception as error:  # whatever a half-installed library raises
        return explain(error)


class _Sizes(NamedTuple):
    """Bytes of the weights of all engines, and of the largest one with its conditioning."""

    together: int
    least: int


def _sizes(target: str, paths: list[Path], device: str | None) -> _Sizes:
    """Return the bytes of engines, the conditioning last; engines that share weights hold them once."""
    from dyexport.runtime.residency import distinct_bytes

    engines = make_engines(target, paths, EngineOptions(device=device or "cpu"))
    *sizes, conditioning = (distinct_bytes(engine.weights) for engine in engines)
    shared = distinct_bytes(span for engine in engines for span in engine.weights)
    shares = all(engine.shares_weights for engine in engines)
    return _Sizes(shared if shares else sum(sizes) + conditioning, max(sizes) + conditioning)


def _device(verdict: Verdict, paths: list[Path]) -> str | None:
    """Return the device of the target here, or that for which the engines were compiled."""
    built_for = get_backend(verdict.target).device_of(paths[0]) if paths else None
    return built_for if verdict.device is not None and built_for is not None else verdict.device


def _free(device: str | None, machine: Machine) -> int | None:
    if device == "cuda":
        return machine.accelerators.gpus[0].free_memory
    return machine.host.free_memory
