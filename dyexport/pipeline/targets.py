"""What ``--target`` can name: graphs, and plans that are made from graphs. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from dyexport.bundle.plan_info import ENGINE, PROGRAM, Flavour

ONNX = "onnx"


@dataclass(frozen=True, kw_only=True)
class Target:
    """``export(slice, layout, path)`` writes one graph; ``check(path)`` raises where it is not valid.

    A target with a ``flavour`` of TensorRT has neither: its plans are built from the ONNX graphs, or where there is
    ``build(slice, layout, store, request, out)`` by that; ``file`` is what they are called. ``proof`` says what its
    engines have been run on, ``quantized`` what becomes of int8 and fp8 there.
    """

    about: str
    proof: str
    quantized: str
    suffix: str = ""
    module: str = ""
    export_name: str = ""
    check_name: str | None = None
    build_name: str | None = None
    file: str = ENGINE
    flavour: Flavour | None = None
    static_tokens: bool = False  # its runtime cannot allocate by data

    @property
    def export(self) -> Callable[..., None]:
        return self._load(self.export_name)

    @property
    def check(self) -> Callable[..., None] | None:
        return self._load(self.check_name) if self.check_name else None

    @property
    def build(self) -> Callable[..., object] | None:
        return self._load(self.build_name) if self.build_name else None

    def _load(self, name: str) -> Any:
        """An exporter is imported when its first graph is made."""
        return getattr(import_module(self.module), name)


TARGETS = {
    ONNX: Target(
        about="ONNX graphs over one weight store, for ONNX Runtime on a CPU or CUDA",
        proof="run and verified on CPUs; CUDA untested",
        quantized="int8 beside fp32 multiplies in int8 on CPUs; fp8 rounds, then multiplies floats",
        suffix=".onnx",
        module="dyexport.exporters.onnx_graph",
        export_name="export_onnx",
        check_name="check_onnx",
    ),
    "tensorrt-rtx": Target(
        about="TensorRT-RTX plans, built ahead of time on any machine",
        proof="built on CPUs from the graphs that verify checks; never run: untested on a GPU",
        quantized="both build; NVIDIA lists products in fp8 from 8.9 on, and int8 for weights alone",
        flavour="tensorrt-rtx",
        static_tokens=True,
    ),
    "tensorrt": Target(
        about="TensorRT plans for the GPU of the machine that builds them",
        proof="never built, never run: untested on a GPU",
        quantized="never built; NVIDIA lists products in int8, and in fp8 from 8.9 on",
        flavour="tensorrt",
    ),
    "torch-tensorrt": Target(
        about="Torch-TensorRT programs for the GPU of the machine that builds them",
        proof="never built, never run: untested on a GPU; what it compiles equals the slim modules on CPUs",
        quantized="int8 and fp8 are refused: Q/DQ nodes are in graphs, not in the modules that it compiles",
        flavour="torch-tensorrt",
        module="dyexport.exporters.torch_program",
        build_name="build_program",
        file=PROGRAM,
        static_tokens=True,
    ),
}
