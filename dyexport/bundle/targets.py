"""Engine formats that ``--target`` names. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dyexport.bundle.package_info import PACKAGE
from dyexport.bundle.plan_info import ENGINE, PROGRAM, Flavour

ONNX = "onnx"

Option = Literal["profile", "compute_capability", "stream_weights", "device", "jobs"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """An engine format.

    A ``flavour`` of TensorRT builds plans from the ONNX graphs, or with ``from_modules`` from the slim torch modules;
    ``file`` is the name of such a plan. ``proof`` says which hardware its engines have run on, ``quantized`` how they
    compute int8 and fp8. With ``static_tokens``, its runtime cannot allocate by data. ``options`` are the options of
    ``dyexport compile`` that its compiler has; a target that is not ``compiled`` runs the ONNX graphs.
    """

    about: str
    proof: str
    quantized: str
    options: frozenset[Option] = frozenset()
    compiled: bool = True
    flavour: Flavour | None = None
    from_modules: bool = False
    file: str = ENGINE
    static_tokens: bool = False


TARGETS = {
    ONNX: Target(
        about="ONNX graphs over one weight store, for ONNX Runtime on a CPU or CUDA",
        proof="run and verified on CPUs; CUDA untested",
        quantized="int8 with fp32 multiplies in int8 on CPUs; fp8 rounds, then multiplies floats",
        compiled=False,
    ),
    "onnx-rtx": Target(
        about="the ONNX graphs on TensorRT-RTX, which ONNX Runtime's provider compiles on the GPU that runs them",
        proof="never run: untested on a GPU",
        quantized="never run; NVIDIA lists products in fp8 from 8.9 on, and int8 for weights alone",
        options=frozenset({"device"}),
        compiled=False,
        static_tokens=True,
    ),
    "tensorrt-rtx": Target(
        about="TensorRT-RTX plans, built ahead of time on any machine",
        proof="built on CPUs from the graphs that verify checks; never run: untested on a GPU",
        quantized="both build; NVIDIA lists products in fp8 from 8.9 on, and int8 for weights alone",
        options=frozenset({"profile", "compute_capability", "stream_weights", "jobs"}),
        flavour="tensorrt-rtx",
        static_tokens=True,
    ),
    "tensorrt": Target(
        about="TensorRT plans for the GPU of the machine that builds them",
        proof="never built, never run: untested on a GPU",
        quantized="never built; NVIDIA lists products in int8, and in fp8 from 8.9 on",
        options=frozenset({"profile", "stream_weights"}),
        flavour="tensorrt",
    ),
    "torch": Target(
        about="AOTInductor packages for the CPU or GPU of the machine that builds them, over one weight store",
        proof="run and verified on CPUs, in bf16 too; CUDA untested",
        quantized="int8 and fp8 are refused: Q/DQ nodes are in graphs, not in the modules that it compiles",
        options=frozenset({"device", "jobs"}),
        from_modules=True,
        file=PACKAGE,
    ),
    "torch-tensorrt": Target(
        about="Torch-TensorRT programs for the GPU of the machine that builds them",
        proof="never built, never run: untested on a GPU; what it compiles equals the slim modules on CPUs",
        quantized="int8 and fp8 are refused: Q/DQ nodes are in graphs, not in the modules that it compiles",
        options=frozenset({"profile"}),
        flavour="torch-tensorrt",
        from_modules=True,
        file=PROGRAM,
        static_tokens=True,
    ),
}


def plan_targets(targets: tuple[str, ...]) -> list[str]:
    """Return the targets that are TensorRT plans."""
    return [target for target in targets if TARGETS[target].flavour is not None]


def compiled_targets(targets: tuple[str, ...]) -> list[str]:
    """Return the targets whose engines are compiled from the ONNX graphs or the slim modules."""
    return [target for target in targets if TARGETS[target].compiled]
