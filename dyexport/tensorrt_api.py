"""TensorRT's Python API by flavour: the part that classic TensorRT and TensorRT-RTX share, and Torch-TensorRT's."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dyexport.bundle.plan_info import OLDEST_FP32, Flavour
from dyexport.errors import DyexportError, EngineBuildError, MissingDependencyError, UsageError

RTX_LIBRARIES = ("libcudart.so*", "libtensorrt_rtx.so*", "libtensorrt_onnxparser_rtx.so*")  # in the order of need


@dataclass(frozen=True, kw_only=True)
class Api:
    """API of one flavour: ``trt`` is the module; ``measures`` is True if its builder times kernels on the GPU.

    TensorRT-RTX does not: it chooses kernels when a plan is loaded, and its timing cache is a stub.
    """

    flavour: Flavour
    trt: Any
    measures: bool

    @property
    def version(self) -> str:
        return str(self.trt.__version__)

    def own_capabilities(self) -> tuple[str, ...]:
        """Return the compute capability that plans are built for if none is requested; empty: all of the builder's."""
        if not self.measures:
            return ()
        import torch

        return ("{}.{}".format(*torch.cuda.get_device_capability()),)

    def capability(self, text: str) -> Any:
        """Return the builder's constant for ``8.6``. Raises ``UsageError`` for a GPU that it builds no plan for."""
        if text not in (known := self.capabilities()):
            spelled = ", ".join(known) or "none but the GPU it runs on"
            raise UsageError(f"{self.flavour} does not build for compute capability {text}; it knows {spelled}")
        return getattr(self.trt.ComputeCapability, f"SM{text.replace('.', '')}")

    def capabilities(self) -> tuple[str, ...]:
        """Return the compute capabilities that may be requested, oldest first.

        Without those before ``OLDEST_FP32``, which the builder knows: every bundle has products in fp32.
        """
        members = getattr(getattr(self.trt, "ComputeCapability", None), "__members__", {})
        texts = [f"{name[2:-1]}.{name[-1]}" for name in members if re.fullmatch(r"SM\d{2,}", name)]
        return tuple(sorted((text for text in texts if float(text) >= OLDEST_FP32), key=float))


@cache
def load_api(flavour: Flavour) -> Api:
    """Import a flavour. Raises ``MissingDependencyError``, or ``EngineBuildError`` without its GPU."""
    return _LOADERS[flavour]()


def _load_rtx() -> Api:
    try:
        folder = Path(str(import_module("onnxruntime_ep_nv_tensorrt_rtx").__file__)).parent
        for pattern in RTX_LIBRARIES:
            ctypes.CDLL(str(next(folder.glob(pattern))), ctypes.RTLD_GLOBAL)
        return Api(flavour="tensorrt-rtx", trt=import_module("tensorrt_rtx_bindings"), measures=False)
    except (ImportError, OSError, StopIteration) as error:
        raise MissingDependencyError("TensorRT-RTX", "rtx") from error


def _load_classic() -> Api:
    return _load_for_gpu("tensorrt", "tensorrt", "TensorRT")


def _load_torch() -> Api:
    return _load_for_gpu("torch-tensorrt", "torch_tensorrt", "Torch-TensorRT")


def _load_for_gpu(flavour: Flavour, module: str, library: str) -> Api:
    import torch

    installed = find_spec(module) is not None
    if not torch.cuda.is_available():
        missing = "" if installed else f", nor is {library} installed"
        raise EngineBuildError(
            f"--target {flavour} builds for the GPU of this machine, and torch sees none{missing}; "
            "build where there is one, or use --target tensorrt-rtx, which needs none"
        )
    if not installed:
        raise MissingDependencyError(library, flavour)
    try:
        return Api(flavour=flavour, trt=import_module(module), measures=True)
    except (ImportError, OSError) as error:
        raise MissingDependencyError(library, flavour) from error  # an extra has the name of its flavour


_LOADERS: dict[Flavour, Callable[[], Api]] = {
    "tensorrt": _load_classic,
    "tensorrt-rtx": _load_rtx,
    "torch-tensorrt": _load_torch,
}


class BuildLog:
    """Recorder of the builder's messages; its last errors explain a failure."""

    def __init__(self, trt: Any) -> None:
        self.errors: list[str] = []
        outer = self

        class Logger(trt.ILogger):  # type: ignore[misc, name-defined, unused-ignore]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                    outer.errors.append(message)

        self.logger = Logger()

    def failure(self, what: str) -> DyexportError:
        return EngineBuildError(f"{what}: {self.errors[0] if self.errors else 'the builder gave no reason'}")
