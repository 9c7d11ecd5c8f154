"""Which engines of a bundle fit this machine, how large their weights are, and how to make the others."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dyexport.bundle.manifest import CONDITIONING
from dyexport.bundle.plan import ALLOCATES, segment_name
from dyexport.bundle.reader import Bundle
from dyexport.bundle.targets import TARGETS
from dyexport.doctor.probing import Findings, explain
from dyexport.doctor.targets import Machine, Verdict
from dyexport.engines.registry import EngineOptions, engine_files, get_backend, make_engines


@dataclass(frozen=True, kw_only=True)
class EngineFit:
    """Fitness of a machine for the engines of one target in a bundle.

    ``engines`` is how many there are at all budgets, the dense network included, and ``fitting`` how many run; the rest
    do not for ``reason``. ``weight_bytes`` is of all engines that sampling uses together at the default budget,
    ``least_bytes`` of the largest one and the conditioning: what has to be in memory at a time.
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
        """True if one engine at a time fits; None where a size is unknown."""
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
    refusal = _refusal(bundle, target)
    reasons = [refusal or _reason(bundle, verdict, each) for each in paths]
    fitting = reasons.count(None)
    device = findings.attempt(f"device of {target}", lambda: _device(verdict, paths)) or verdict.device
    sampled = paths[: len(bundle.manifest.plan.segments) + 1]
    sizes = findings.attempt(f"weights of {target}", lambda: _sizes(target, sampled, device)) if paths else None
    replaces = verdict.device is not None and fitting < len(paths)
    makeable = refusal is None and TARGETS[target].compiled and verdict.compiles and (replaces or not paths)
    return EngineFit(
        target=target,
        device=device,
        engines=len(paths),
        fitting=fitting,
        reason=next(filter(None, reasons), None) if paths else refusal or _absence(verdict, makeable),
        weight_bytes=None if sizes is None else sizes.together,
        least_bytes=None if sizes is None else sizes.least,
        free_bytes=_free(device, machine),
        compile=f"dyexport compile {shlex.quote(str(path))} --target {target}" if makeable else None,
    )


def _paths(bundle: Bundle, target: str) -> list[Path]:
    """Return the engine files of all networks at all budgets; none if the bundle lacks the target.

    Those that sampling uses at the default budget come first: the segments and their conditioning.
    """
    files, paths = engine_files(target), dict[Path, None]()  # ordered; budgets share the dense network
    for each in bundle.at_each_budget():
        if files not in {engine.target for engine in each.manifest.engines}:
            continue
        found = each.engine_paths(files)
        segments = [segment_name(index) for index in range(len(each.manifest.plan.segments))]
        paths |= dict.fromkeys(found.pop(network) for network in (*segments, CONDITIONING))
        paths |= dict.fromkeys(found.values())
    return list(paths)


def _refusal(bundle: Bundle, target: str) -> str | None:
    """Explain why a target can run this bundle on no machine; None if it can."""
    described, quantization = TARGETS[target], bundle.manifest.model.quantization
    if described.from_modules and quantization is not None:
        return f"cannot be compiled: its linear layers are in {quantization}, which only its ONNX graphs have"
    if not described.static_tokens or not any(manifest.plan.allocates for manifest in bundle.manifests()):
        return None
    verb = "compiled" if described.compiled else "run"
    return f"cannot be {verb}: its engines skip tokens on the path {ALLOCATES!r}; build it with --token-path dynamic"


def _absence(verdict: Verdict, makeable: bool) -> str:
    """Return the reason for a target without engines."""
    if makeable and verdict.device is None:
        return "does not run here; can be compiled here"
    return "the bundle has no such engines"


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
