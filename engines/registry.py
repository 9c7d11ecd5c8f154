"""Registry of engines by the name of their target. A backend is imported when one of its engines is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dyexport.bundle.graph_forms import AttentionForm
from dyexport.engines.base import Engine
from dyexport.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options common to all backends.

    ``device`` is ``cpu``, ``cuda`` or ``cuda:N``. ``share_weights`` keeps one copy of the weights in memory.
    ``streaming_budget`` bounds the bytes of each engine's weights that stay on the device, where the rest can be
    streamed. None keeps all of them there. ``attention`` is the form of attention in graphs that ONNX Runtime runs;
    None selects it by device. Plans have the form that they were built with. With ``cuda_graphs``, ONNX Runtime
    captures its runs on CUDA; TensorRT always does.
    """

    device: str = "cpu"
    share_weights: bool = False
    streaming_budget: int | None = None
    attention: AttentionForm | None = None
    cuda_graphs: bool = False


@dataclass(frozen=True, kw_only=True)
class Backend:
    """Functions of one target's engines.

    ``make(paths, options)`` makes engines that run one after another, as those of a bundle do.
    ``incompatibility(path)`` explains why an engine file cannot run on this machine; None if it can. ``fallback`` is
    the target that then runs the ONNX graph. ``streams(path)`` tells whether the weights can be streamed from host
    memory. ``device_of(path)`` is the kind of device that an engine file was compiled for; None if it runs on any.
    """

    make: Callable[[Sequence[Path], EngineOptions], list[Engine]]
    has_cuda: Callable[[], bool]
    incompatibility: Callable[[Path], str | None] = lambda path: None
    fallback: str = "onnx"
    streams: Callable[[Path], bool] = lambda path: False
    device_of: Callable[[Path], str | None] = lambda path: None


def _onnx() -> Backend:
    from dyexport.engines.ort import OrtEngine, has_cuda
    from dyexport.engines.ort_cuda import OrtCudaEngine

    def make(paths: Sequence[Path], options: EngineOptions) -> list[Engine]:
        device, shared, attention = options.device, options.share_weights, options.attention
        if device != "cpu":
            graphs = options.cuda_graphs
            return [OrtCudaEngine(path, device=device, attention=attention, cuda_graphs=graphs) for path in paths]
        return [OrtEngine(path, device=device, share_weights=shared, attention=attention) for path in paths]

    return Backend(make=make, has_cuda=has_cuda)


def _onnx_rtx() -> Backend:
    import torch

    from dyexport.engines.ort_rtx import OrtRtxEngine, incompatibility

    def make(paths: Sequence[Path], options: EngineOptions) -> list[Engine]:
        device, budget, attention = options.device, options.streaming_budget, options.attention
        return [OrtRtxEngine(path, device=device, streaming_budget=budget, attention=attention) for path in paths]

    return Backend(
        make=make,
        has_cuda=torch.cuda.is_available,
        incompatibility=lambda path: incompatibility(),
        streams=lambda path: True,
    )


def _tensorrt(fallback: str = "onnx") -> Backend:
    import torch

    from dyexport.engines.tensorrt_contexts import Workspace
    from dyexport.engines.tensorrt_fit import incompatibility, plan_info
    from dyexport.engines.tensorrt_rt import TensorRtEngine

    def make(paths: Sequence[Path], options: EngineOptions) -> list[Engine]:
        workspace = Workspace(options.device)
        budget = options.streaming_budget
        return [TensorRtEngine(path, workspace=workspace, streaming_budget=budget) for path in paths]

    return Backend(
        make=make,
        has_cuda=torch.cuda.is_available,
        incompatibility=incompatibility,
        fallback=fallback,
        streams=lambda path: plan_info(path).streamable,
    )


def _torch_tensorrt() -> Backend:
    import torch

    from dyexport.engines.tensorrt_fit import incompatibility
    from dyexport.engines.torch_tensorrt_rt import TorchTensorRtEngine

    def make(paths: Sequence[Path], options: EngineOptions) -> list[Engine]:
        return [TorchTensorRtEngine(path, device=options.device) for path in paths]

    return Backend(make=make, has_cuda=torch.cuda.is_available, incompatibility=incompatibility)


def _torch() -> Backend:
    import torch

    from dyexport.engines.torch_rt import device_of, incompatibility, make_engines

    return Backend(
        make=lambda paths, options: make_engines(paths, options.device),
        has_cuda=torch.cuda.is_available,
        incompatibility=incompatibility,
        device_of=device_of,
    )


BACKENDS: dict[str, Callable[[], Backend]] = {
    "onnx": _onnx,
    "onnx-rtx": _onnx_rtx,
    "torch": _torch,
    "torch-tensorrt": _torch_tensorrt,
    "tensorrt": _tensorrt,
    "tensorrt-rtx": partial(_tensorrt, "onnx-rtx"),  # its provider uses the same builder
}
FILES = {"onnx-rtx": "onnx"}
"""Targets that run the engine files of another target."""


def engine_files(target: str) -> str:
    """Return the target whose engine files a target runs; imports no backend.

    Raises ``UsageError`` for an unknown target.
    """
    if target not in BACKENDS:
        raise UsageError(f"unknown target {target!r}; known: {', '.join(BACKENDS)}")
    return FILES.get(target, target)


def get_backend(target: str) -> Backend:
    """Return the backend of a target. Raises ``UsageError`` for an unknown one."""
    engine_files(target)
    return BACKENDS[target]()


def make_engines(target: str, paths: Sequence[Path], options: EngineOptions | None = None) -> list[Engine]:
    """Make engines over files of one bundle, not yet active. Raises ``UsageError`` for an unknown target."""
    return get_backend(target).make(paths, options or EngineOptions())
