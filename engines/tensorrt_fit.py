"""Checks that a TensorRT plan fits a machine and a shape; most need no device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dyexport.bundle.plan_info import INFO, Flavour, PlanInfo, Profile
from dyexport.errors import EngineMismatchError, MissingDependencyError
from dyexport.tensorrt_api import BuildLog, load_api


def plan_info(path: Path) -> PlanInfo:
    """Read the description next to a plan. Raises ``EngineMismatchError``."""
    return PlanInfo.read(path.with_name(INFO))


def incompatibility(path: Path) -> str | None:
    """Explain why a plan cannot run here and what to do; None if it can."""
    import torch

    info = plan_info(path)
    if not torch.cuda.is_available():
        return f"{info.flavour} plans run on NVIDIA GPUs and torch sees none; use --target onnx"
    try:
        api = load_api(info.flavour)
    except MissingDependencyError as error:
        return str(error)
    major, minor = torch.cuda.get_device_capability()
    return version_mismatch(info, api.version, f"{major}.{minor}") or _refusal(api.trt, path)


def cure(flavour: Flavour) -> str:
    """Return what to do about a plan that does not fit this machine."""
    return f"compile the bundle here: dyexport compile BUNDLE --target {flavour}"


def version_mismatch(info: PlanInfo, version: str, capability: str) -> str | None:
    """Explain why a plan does not match this TensorRT version and GPU; None if it does."""
    if info.version != version:
        return f"built by {info.flavour} {info.version}, and {version} is installed; {cure(info.flavour)}"
    if info.compute_capabilities and capability not in info.compute_capabilities:
        built = ", ".join(info.compute_capabilities)
        return f"built for compute capability {built}, and this GPU has {capability}; {cure(info.flavour)}"
    return None


def _refusal(trt: Any, path: Path) -> str | None:
    """Ask TensorRT to validate the plan's header; classic TensorRT validates a plan only when it loads it."""
    if not hasattr(trt, "Runtime"):  # Torch-TensorRT
        return None
    runtime = trt.Runtime(BuildLog(trt).logger)
    if not hasattr(runtime, "get_engine_validity"):
        return None
    with path.open("rb") as file:
        validity, flags = runtime.get_engine_validity(file.read(runtime.engine_header_size))
    if validity != trt.EngineValidity.INVALID:
        return None
    reasons = [name for name, flag in trt.EngineInvalidityDiagnostics.__members__.items() if flags & int(flag)]
    named = ", ".join(reasons).lower().replace("_", " ") or "no reason given"
    return f"TensorRT refuses the plan on this GPU ({named}); use --target onnx"


def choose_profile(profiles: tuple[Mapping[str, Profile], ...], symbols: Mapping[str, int]) -> int:
    """Return the profile that includes these sizes, with the nearest optimum. Raises ``EngineMismatchError``."""
    fitting = [index for index, profile in enumerate(profiles) if _holds(profile, symbols)]
    if not fitting:
        sizes = ", ".join(f"{name} = {size}" for name, size in symbols.items())
        ranges = "; ".join(", ".join(f"{n} {p.min} to {p.max}" for n, p in each.items()) for each in profiles)
        raise EngineMismatchError(
            f"{sizes} fits no profile of this plan ({ranges}); give `dyexport compile` a --profile for such sizes"
        )
    return min(fitting, key=lambda index: sum(abs(profiles[index][s].opt - size) for s, size in _own(symbols).items()))


def _holds(profile: Mapping[str, Profile], symbols: Mapping[str, int]) -> bool:
    return all(profile[name].min <= size <= profile[name].max for name, size in _own(symbols).items())


def _own(symbols: Mapping[str, int]) -> dict[str, int]:
    """Return sizes by the name of a profile: ``2*height`` of 8 is ``height`` of 4."""
    split = {symbol: symbol.rpartition("*") for symbol in symbols}
    return {name: symbols[symbol] // int(factor or 1) for symbol, (factor, _, name) in split.items()}
