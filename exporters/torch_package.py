"""Compile slim modules with AOTInductor to packages without weights. CUDA is untested.

Weights are inputs of a package, before the network's own inputs. An engine passes views of the weight store: no weight
is copied, and memory is freed when the engine lets go of them. (AOTInductor can also bind weights that a program owns;
torch 2.13 then never frees them.) Neither the weights nor memory for them is needed to compile.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch._inductor
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dyexport.bundle.package_info import PACKAGE, PackageInfo, machine_of
from dyexport.bundle.plan import Segment
from dyexport.bundle.spec import ModelSpec
from dyexport.digests import sha256_of
from dyexport.errors import EngineBuildError, ExportError, UsageError, reason
from dyexport.exporters.examples import dynamic_shapes, example_inputs, example_sizes
from dyexport.exporters.exported_program import outputs_of
from dyexport.exporters.tensorrt_profiles import profiles_for
from dyexport.slicing.slicer import Slice

OPTIONS: Mapping[str, Any] = {
    "cpp.dynamic_threads": True,  # as many threads as torch has when it runs
    "cpp.enable_unsafe_math_opt_flag": False,
    "cpp.enable_floating_point_contract_flag": "off",
    "aot_inductor.precompile_headers": False,  # they would be in the cache, which is removed
    "aot_inductor.enable_line_tables": False,  # they would hold paths of this machine
}
"""Options of AOTInductor; versions of torch without one of them do what it says."""


class WeightsFirst(nn.Module):
    """Wrapper that takes the weights of a module as its first inputs, in the order of ``weights``."""

    def __init__(self, module: nn.Module, weights: tuple[str, ...], inputs: tuple[str, ...]) -> None:
        super().__init__()
        self._module = [module]  # in a list, so that its weights are not this module's
        self.weights, self.inputs = weights, inputs

    def forward(self, *tensors: Tensor) -> Any:
        count = len(self.weights)
        weights = dict(zip(self.weights, tensors[:count], strict=True))
        inputs = dict(zip(self.inputs, tensors[count:], strict=True))
        return torch.func.functional_call(self._module[0], weights, (), inputs)


def build_package(
    slice_: Slice, out: Path, *, sizes: Mapping[str, int], precision: str, graph_sha256: str, device: str = "cpu"
) -> PackageInfo:
    """Write the package of a network and its description into the new directory ``out``.

    ``sizes`` are typical sizes of dynamic dimensions, for which the code is tuned. ``device`` is ``cpu`` or ``cuda``:
    code is compiled for that of this machine. ``graph_sha256`` is of the ONNX graph that describes the weights.

    Raises ``EngineBuildError`` without a C++ compiler, ``UsageError`` without the GPU, and ``ExportError`` if torch
    cannot export the network.
    """
    check_compiler(device)
    weights = tuple(sorted(slice_.recipes))
    program = export_code(slice_, weights, sizes=sizes, device=device)
    compile_program(program, out)
    info = PackageInfo(
        version=torch.__version__,
        machine=machine_of(device),
        precision=precision,
        weights=weights,
        inputs=slice_.inputs,
        outputs=outputs_of(program, slice_),
        limits=dict(slice_.limits),
        floors=dict(slice_.floors),
        graph_sha256=graph_sha256,
        package_sha256=sha256_of(out / PACKAGE),
    )
    info.write(out)
    return info


def typical_sizes(spec: ModelSpec, segment: Segment | None, slice_: Slice) -> dict[str, int]:
    """Return the sizes of dynamic dimensions that a network runs with most often; no two are equal, and none is 1.

    ``segment`` is None for a conditioning network.
    """
    (profiles,) = profiles_for(spec, segment, ())
    sizes: dict[str, int] = {}
    for symbol in dict.fromkeys(size for spec in slice_.inputs for size in spec.shape if isinstance(size, str)):
        factor, _, name = symbol.rpartition("*")
        size = profiles[name].opt * int(factor or 1)
        if size > 1 and size not in sizes.values():
            sizes[symbol] = size
    return sizes


def check_compiler(device: str = "cpu") -> None:
    """Raise ``UsageError`` for a GPU that torch does not see, ``EngineBuildError`` without a C++ compiler."""
    if device != "cpu" and not torch.cuda.is_available():
        raise UsageError(f"--device is {device}, and torch sees no GPU; use --device cpu, or install torch for CUDA")
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise EngineBuildError(
            f"--target torch compiles C++ with {compiler}, which is not installed; "
            "run: apt-get install g++, or set CXX to a compiler"
        )


def export_code(
    slice_: Slice, weights: tuple[str, ...], *, sizes: Mapping[str, int], device: str = "cpu"
) -> torch.export.ExportedProgram:
    """Export a network that takes its weights, then its inputs, without memory for either. Raises ``ExportError``."""
    inputs = tuple(spec.name for spec in slice_.inputs)
    module = WeightsFirst(slice_.module, weights, inputs).eval()
    like = example_inputs(slice_, {**example_sizes(slice_), **sizes})
    with FakeTensorMode():
        fake = [torch.empty(slice_.recipes[w].shape, dtype=slice_.recipes[w].dtype, device=device) for w in weights]
        fake += [torch.empty(like[name].shape, dtype=like[name].dtype, device=device) for name in inputs]
    shapes = dynamic_shapes(slice_)
    try:
        return torch.export.export(
            module,
            tuple(fake),
            dynamic_shapes=((*({} for _ in weights), *(shapes[name] for name in inputs)),),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,  # a guard would exclude a size of 1
        )
    except Exception as error:  # the tracer raises many types
        raise ExportError(f"torch cannot export the network: {error}") from error


def compile_program(program: torch.export.ExportedProgram, out: Path) -> None:
    """Compile a program to a package in the new directory ``out``. Raises ``EngineBuildError``."""
    out.mkdir()
    known = set(torch._inductor.list_options())
    options = {name: value for name, value in OPTIONS.items() if name in known}
    try:
        with _generated_sources(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch._inductor.aoti_compile_and_package(program, package_path=str(out / PACKAGE), inductor_configs=options)
    except Exception as error:  # raised by many libraries
        raise EngineBuildError(f"AOTInductor cannot compile the network: {reason(error)}") from error


@contextmanager
def _generated_sources() -> Iterator[None]:
    """Keep generated sources in a folder that is removed afterwards."""
    name, before = "TORCHINDUCTOR_CACHE_DIR", os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with TemporaryDirectory(prefix="dyexport-inductor-") as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            os.environ.pop(name, None)
            if before is not None:
                os.environ[name] = before
