"""Engines by the name of their target. A backend is imported only when one of its engines is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dyexport.engines.base import Engine
from dyexport.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """``device`` is ``cpu``, ``cuda`` or ``cuda:N``; ``share_weights`` keeps one copy of the weights."""

    device: str = "cpu"
    share_weights: bool = False


@dataclass(frozen=True, kw_only=True)
class Backend:
    """``unfit(path)`` says why an engine file cannot run on this machine; None where it can."""

    make: Callable[[Path, EngineOptions], Engine]
    has_cuda: Callable[[], bool]
    unfit: Callable[[Path], str | None] = lambda path: None


def _onnx() -> Backend:
    from dyexport.engines.ort import OrtEngine, has_cuda

    def make(path: Path, options: EngineOptions) -> Engine:
        return OrtEngine(path, device=options.device, share_weights=options.share_weights)

    return Backend(make=make, has_cuda=has_cuda)


def _torch() -> Backend:
    import torch

    from dyexport.engines.torch_rt import TorchEngine

    def make(path: Path, options: EngineOptions) -> Engine:
        return TorchEngine(path, device=options.device)

    return Backend(make=make, has_cuda=torch.cuda.is_available)


def _tensorrt() -> Backend:
    import torch

    from dyexport.engines.tensorrt_rt import TensorRtEngine, unfit

    def make(path: Path, options: EngineOptions) -> Engine:
        return TensorRtEngine(path, device=options.device)

    return Backend(
        make=make,
        has_cuda=torch.cuda.is_available,
        unfit=lambda path: unfit(TensorRtEngine(path).info),
    )


BACKENDS: dict[str, Callable[[], Backend]] = {
    "onnx": _onnx,
    "torch": _torch,
    "tensorrt": _tensorrt,
    "tensorrt-rtx": _tensorrt,
}


def get_backend(target: str) -> Backend:
    """What runs engines of this target. Raises ``UsageError`` for an unknown one."""
    if target not in BACKENDS:
        raise UsageError(f"unknown target {target!r}; known: {', '.join(BACKENDS)}")
    return BACKENDS[target]()


def make_engine(target: str, path: Path, options: EngineOptions | None = None) -> Engine:
    """An engine over one file of a bundle, not yet active. Raises ``UsageError`` for an unknown target."""
    return get_backend(target).make(path, options or EngineOptions())
