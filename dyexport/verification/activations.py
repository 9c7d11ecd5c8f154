"""Activations of an ONNX graph, matched with those of the torch module that it was exported from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dyexport.bundle.graph_labels import MODULE

Arrays = Mapping[str, np.ndarray]


class ActivationPair(NamedTuple):
    """One tensor as both compute it; ``module`` is the torch module that produces it, '' for the network itself."""

    module: str
    onnx: np.ndarray
    torch: np.ndarray


class Activations(NamedTuple):
    """Pairs in the order of the graph; ``unmatched`` values between modules have no unique counterpart in torch."""

    pairs: list[ActivationPair]
    unmatched: int


@dataclass(frozen=True, kw_only=True)
class ModuleBoundaries:
    """Values of a graph that cross from one torch module to another.

    ``producers`` is the module that produces each value, in the order of the graph. ``entering`` and ``leaving`` are
    the values that cross into a module and out of it, by its name. ``topk_outputs`` are the values and indices of TopK
    nodes, ``outputs`` those of the graph.
    """

    producers: Mapping[str, str]
    entering: Mapping[str, Sequence[str]]
    leaving: Mapping[str, Sequence[str]]
    topk_outputs: Sequence[tuple[str, str]]
    outputs: Sequence[str]

    @property
    def values(self) -> list[str]:
        """All values at module boundaries, in the order of the graph."""
        crossing = {name for side in (self.entering, self.leaving) for names in side.values() for name in names}
        names = crossing.union(self.outputs, *self.topk_outputs)
        return [name for name in self.producers if name in names]


def find_boundaries(model: onnx.ModelProto) -> ModuleBoundaries:
    """Find values that cross between modules, by the module names that export leaves at every node.

    A value enters the modules around the node that reads it, and leaves those around the node that produces it, unless
    it stays inside of them.
    """
    nodes = model.graph.node
    around = {name: enclosing_modules(node) for node in nodes for name in node.output}
    uses = [(name, enclosing_modules(node)) for node in nodes for name in node.input if name in around]
    uses += [(output.name, ()) for output in model.graph.output]
    entering: dict[str, dict[str, None]] = defaultdict(dict)  # of ordered sets
    leaving: dict[str, dict[str, None]] = defaultdict(dict)
    for name, reader in uses:
        producer = around[name]
        for module in set(reader) - set(producer):
            entering[module][name] = None
        for module in set(producer) - set(reader):
            leaving[module][name] = None
    return ModuleBoundaries(
        producers={name: (modules or ("",))[0] for name, modules in around.items()},
        entering={module: list(names) for module, names in entering.items()},
        leaving={module: list(names) for module, names in leaving.items()},
        topk_outputs=[(node.output[0], node.output[1]) for node in nodes if node.op_type == "TopK"],
        outputs=[output.name for output in model.graph.output],
    )


def enclosing_modules(node: onnx.NodeProto) -> tuple[str, ...]:
    """Return the modules around a node, innermost first: ``blocks.0.fc1``, ``blocks.0`` and ``blocks``."""
    module = next((entry.value for entry in node.metadata_props if entry.key == MODULE), "")
    parts = module.split(".") if module else []
    return tuple(".".join(parts[:length]) for length in range(len(parts), 0, -1))


def run_graph(path: Path, model: onnx.ModelProto, values: Sequence[str], feed: Arrays) -> dict[str, np.ndarray]:
    """Run a graph in ONNX Runtime on the CPU and return ``values``. Making a value an output prevents its fusion."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    marked = onnx.ModelProto()
    marked.CopyFrom(model)
    del marked.graph.output[:]
    marked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in values)
    session = ort.InferenceSession(marked.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(values, session.run(list(values), dict(feed)), strict=True))


@dataclass
class Recorder:
    """The floating-point inputs and outputs of every module of a torch network, at its first call."""

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)

    def watch(self, network: nn.Module) -> None:
        for name, module in network.named_modules():
            if name:
                module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            self.inputs.setdefault(name, list(_floats(inputs)))
            self.outputs.setdefault(name, list(_floats(output if isinstance(output, tuple) else (output,))))

        return hook


def _floats(values: Iterable[Any]) -> Iterator[Tensor]:
    return (value for value in values if isinstance(value, Tensor) and value.is_floating_point())


class ReplayTopK(TorchFunctionMode):
    """Replacement of ``topk`` that lists its rows in the order of another runtime, since each has its own.

    ``scores`` are those that torch would have picked, sorted: if the other runtime's are the same, it picked the same
    rows.
    """

    def __init__(self, indices: Iterable[np.ndarray]) -> None:
        super().__init__()
        self.indices = iter(indices)
        self.scores: list[np.ndarray] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not torch.Tensor.topk:
            return result
        self.scores.append(np.sort(result.values.numpy(), axis=1))
        index = torch.from_numpy(next(self.indices))  # (B, K)
        return torch.return_types.topk((args[0].gather(1, index), index))


@torch.no_grad()
def match_activations(path: Path, module: nn.Module, feed: Mapping[str, Tensor]) -> Activations:
    """Run a graph and its module on the same inputs, and match the tensors between modules.

    A tensor that enters or leaves a module is matched by its shape if no other one of the module has it.
    """
    model = onnx.load(path, load_external_data=False)
    boundaries = find_boundaries(model)
    graph_values = run_graph(path, model, boundaries.values, {name: tensor.numpy() for name, tensor in feed.items()})
    recorder, replay = Recorder(), ReplayTopK(graph_values[index] for _, index in boundaries.topk_outputs)
    recorder.watch(module)
    with replay:
        results = module(**feed)
    results = results if isinstance(results, tuple) else (results,)
    torch_values = dict(zip(boundaries.outputs, (result.numpy() for result in results), strict=True))
    for (scores, _), expected in zip(boundaries.topk_outputs, replay.scores, strict=True):
        graph_values[scores], torch_values[scores] = np.sort(graph_values[scores], axis=1), expected
    for name in recorder.outputs:
        torch_values |= _unique_matches(recorder.outputs[name], boundaries.leaving.get(name, ()), graph_values)
        torch_values |= _unique_matches(recorder.inputs[name], boundaries.entering.get(name, ()), graph_values)
    pairs = [
        ActivationPair(producer, graph_values[name], torch_values[name])
        for name, producer in boundaries.producers.items()
        if name in torch_values
    ]
    floats = [name for name in boundaries.values if _is_float(graph_values[name])]
    return Activations(pairs, sum(name not in torch_values for name in floats))


def _unique_matches(tensors: Sequence[Tensor], names: Sequence[str], graph_values: Arrays) -> dict[str, np.ndarray]:
    """Return tensors by the name of the value of their shape, where there is one of each."""
    matches = {}
    for tensor in tensors:
        alike = [other for other in tensors if other.shape == tensor.shape]
        fitting = [
            name for name in names if graph_values[name].shape == tuple(tensor.shape) and _is_float(graph_values[name])
        ]
        if len(alike) == len(fitting) == 1:
            matches[fitting[0]] = tensor.numpy()
    return matches


def _is_float(array: np.ndarray) -> bool:
    return np.issubdtype(array.dtype, np.floating)
