"""Compile slim modules with Torch-TensorRT to exported programs. Untested on a GPU.

Operators that TensorRT does not support run in torch inside the same program. A program includes its weights, and is
compiled from the module instead of its ONNX graph. Everything up to ``export_program`` works without a GPU.
"""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dyexport.bundle.plan_info import INFO, PROGRAM, PlanInfo
from dyexport.bundle.tensors import TensorSpec
from dyexport.digests import sha256_of
from dyexport.errors import EngineBuildError, ExportError
from dyexport.exporters.examples import dynamic_shapes, example_inputs, example_sizes
from dyexport.exporters.tensorrt_plan import PlanRequest, Profiles, size_range
from dyexport.slicing.recipes import Recipe
from dyexport.slicing.slicer import Slice
from dyexport.slicing.store_layout import StoreLayout
from dyexport.tensorrt_api import load_api


class InOrder(nn.Module):
    """Wrapper that passes positional inputs by name: Torch-TensorRT does not keep names."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module = module
        self.names = names

    def forward(self, *tensors: Tensor) -> Any:
        return self.module(**dict(zip(self.names, tensors, strict=True)))


def build_program(slice_: Slice, layout: StoreLayout, store: Path, request: PlanRequest, out: Path) -> PlanInfo:
    """Write the program of a network and its description into the directory ``out``.

    Raises ``MissingDependencyError`` without Torch-TensorRT, ``EngineBuildError`` without a GPU or for a request
    that it cannot meet.
    """
    api = load_api(request.flavour)
    if len(request.profiles) != 1 or request.compute_capabilities:
        raise EngineBuildError(
            "--target torch-tensorrt builds for one --profile and for the GPU of this machine; "
            "give at most one, and leave --compute-capability out"
        )
    program = export_program(slice_, layout, store, device="cuda")
    inputs = [compiled_input(api.trt, spec, request.profiles[0]) for spec in slice_.inputs]
    try:
        compiled = api.trt.dynamo.compile(program, arg_inputs=inputs, use_explicit_typing=True)
        out.mkdir()
        api.trt.save(compiled, str(out / PROGRAM), retrace=False)  # its graph has the dynamic sizes
    except Exception as error:  # raised by many libraries
        raise EngineBuildError(f"Torch-TensorRT cannot compile the network: {error}") from error
    info = PlanInfo(
        flavour=request.flavour,
        version=api.version,
        compute_capabilities=("{}.{}".format(*torch.cuda.get_device_capability()),),
        precision=request.precision,
        profiles=tuple(dict(profiles) for profiles in request.profiles),
        inputs=slice_.inputs,
        outputs=outputs_of(program, slice_),
        layers=tuple(f"{node.op} {node.target}" for node in compiled.graph.nodes),
        graph_sha256=hashlib.sha256(str(program.graph).encode()).hexdigest(),
        plan_sha256=sha256_of(out / PROGRAM),
    )
    (out / INFO).write_text(info.model_dump_json(indent=1), encoding="utf-8")
    return info


def export_program(
    slice_: Slice, layout: StoreLayout, store: Path, *, device: str = "cpu"
) -> torch.export.ExportedProgram:
    """Export the network with its weights; inputs in the order of the slice, dynamic sizes. Raises ``ExportError``."""
    names = tuple(spec.name for spec in slice_.inputs)
    module = InOrder(load_stored(slice_, layout, store), names).to(device).eval()
    inputs, shapes = example_inputs(slice_, example_sizes(slice_), device), dynamic_shapes(slice_)
    try:
        return torch.export.export(
            module,
            tuple(inputs[name] for name in names),
            dynamic_shapes=(tuple(shapes[name] for name in names),),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,  # a guard would exclude a size of 1
        )
    except Exception as error:  # the tracer raises many types
        raise ExportError(f"torch cannot export the network: {error}") from error


def load_stored(slice_: Slice, layout: StoreLayout, store: Path) -> nn.Module:
    """Return the slim module with weights that are views of the memory-mapped store."""
    mapped = torch.from_file(str(store), shared=False, size=store.stat().st_size, dtype=torch.uint8)  # (bytes,)
    module = copy.deepcopy(slice_.module)
    weights = {name: _view(mapped, recipe, layout.offsets[recipe]) for name, recipe in slice_.recipes.items()}
    module.load_state_dict(weights, assign=True)
    return module


def _view(mapped: Tensor, recipe: Recipe, offset: int) -> Tensor:
    return mapped[offset : offset + recipe.nbytes].view(recipe.dtype).view(recipe.shape)


def compiled_input(torch_tensorrt: Any, spec: TensorSpec, profiles: Profiles) -> Any:
    """Describe an input and its sizes for Torch-TensorRT."""
    dtype = getattr(torch, spec.dtype)
    ranges = [size_range(size, spec, profiles) for size in spec.shape]
    low, best, high = (tuple(getattr(size, end) for size in ranges) for end in ("min", "opt", "max"))
    if low == high:
        return torch_tensorrt.Input(shape=best, dtype=dtype)
    return torch_tensorrt.Input(min_shape=low, opt_shape=best, max_shape=high, dtype=dtype)


def outputs_of(program: torch.export.ExportedProgram, slice_: Slice) -> tuple[TensorSpec, ...]:
    """Describe the outputs; free sizes have the names of the inputs' symbols."""
    named = {str(size): symbol for symbol, size in _symbols(program, slice_).items()}
    (last,) = program.graph.find_nodes(op="output")
    values = [node.meta["val"] for node in last.args[0]]
    return tuple(
        TensorSpec(
            name=name,
            dtype=str(value.dtype).removeprefix("torch."),
            shape=tuple(named[str(size)] if isinstance(size, torch.SymInt) else size for size in value.shape),
        )
        for name, value in zip(slice_.outputs, values, strict=True)
    )


def _symbols(program: torch.export.ExportedProgram, slice_: Slice) -> dict[str, Any]:
    """Return torch's size for each symbol of the inputs."""
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    values = [nodes[name].meta["val"] for name in program.graph_signature.user_inputs]
    return {
        symbol: size
        for spec, value in zip(slice_.inputs, values, strict=True)
        for symbol, size in zip(spec.shape, value.shape, strict=True)
        if isinstance(symbol, str)
    }
