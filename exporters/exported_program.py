"""Slim modules with the weights of a store, as exported programs. No weight is copied."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dyexport.bundle.tensors import TensorSpec
from dyexport.errors import ExportError
from dyexport.exporters.examples import dynamic_shapes, example_inputs, example_sizes
from dyexport.slicing.recipes import Recipe
from dyexport.slicing.slicer import Slice


class InOrder(nn.Module):
    """Wrapper that passes positional inputs by name: compiled programs do not keep names."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module = module
        self.names = names

    def forward(self, *tensors: Tensor) -> Any:
        return self.module(**dict(zip(self.names, tensors, strict=True)))


def export_program(
    slice_: Slice, offsets: Mapping[str, int], store: Path, *, device: str = "cpu"
) -> torch.export.ExportedProgram:
    """Export the network with its weights, which start at ``offsets`` in the store, in bytes.

    Inputs are in the order of the slice, with dynamic sizes. Raises ``ExportError``.
    """
    names = tuple(spec.name for spec in slice_.inputs)
    module = InOrder(load_stored(slice_, offsets, store), names).to(device).eval()
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


def load_stored(slice_: Slice, offsets: Mapping[str, int], store: Path) -> nn.Module:
    """Return the slim module with weights that are views of the memory-mapped store."""
    mapped = torch.from_file(str(store), shared=False, size=store.stat().st_size, dtype=torch.uint8)  # (bytes,)
    module = copy.deepcopy(slice_.module)
    weights = {name: _view(mapped, recipe, offsets[name]) for name, recipe in slice_.recipes.items()}
    module.load_state_dict(weights, assign=True)
    return module


def _view(mapped: Tensor, recipe: Recipe, offset: int) -> Tensor:
    return mapped[offset : offset + recipe.nbytes].view(recipe.dtype).view(recipe.shape)


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
    names = program.graph_signature.user_inputs[-len(slice_.inputs) :]  # a program may take weights before them
    values = [nodes[name].meta["val"] for name in names]
    return {
        symbol: size
        for spec, value in zip(slice_.inputs, values, strict=True)
        for symbol, size in zip(spec.shape, value.shape, strict=True)
        if isinstance(symbol, str)
    }
