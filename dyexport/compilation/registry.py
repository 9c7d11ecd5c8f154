"""Registry of compilers by the name of their target. A compiler's libraries are imported when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dyexport.bundle.plan_info import Flavour
from dyexport.compilation.base import Compiler
from dyexport.exporters.tensorrt_profiles import TensorrtSettings


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """Options of compilers. ``device`` is ``cpu``, ``cuda`` or ``cuda:N``; None chooses CUDA where there is a GPU."""

    tensorrt: TensorrtSettings = field(default_factory=TensorrtSettings)
    device: str | None = None


def _tensorrt(flavour: Flavour) -> Callable[[CompileOptions, Path], Compiler]:
    def make(options: CompileOptions, timings: Path) -> Compiler:
        from dyexport.compilation.tensorrt import TensorRtCompiler

        return TensorRtCompiler.checked(flavour, options.tensorrt, timings)

    return make


def _torch_tensorrt(options: CompileOptions, timings: Path) -> Compiler:
    from dyexport.compilation.tensorrt import TorchTensorRtCompiler

    return TorchTensorRtCompiler(settings=options.tensorrt)


def _torch(options: CompileOptions, timings: Path) -> Compiler:
    from dyexport.compilation.aot_inductor import TorchCompiler

    return TorchCompiler.on(options.device)


COMPILERS: dict[str, Callable[[CompileOptions, Path], Compiler]] = {
    "tensorrt": _tensorrt("tensorrt"),
    "tensorrt-rtx": _tensorrt("tensorrt-rtx"),
    "torch": _torch,
    "torch-tensorrt": _torch_tensorrt,
}


def get_compiler(target: str, options: CompileOptions, timings: Path) -> Compiler:
    """Return the compiler of a target, whose builder can be used here; ``timings`` is a folder that it may keep.

    Raises ``MissingDependencyError`` if the builder is not installed, ``EngineBuildError`` if it cannot be used here,
    and ``UsageError`` for a GPU that it does not build for.
    """
    compiler = COMPILERS[target](options, timings)
    compiler.version()
    return compiler
