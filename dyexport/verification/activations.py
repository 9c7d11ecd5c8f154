"""Values of an ONNX graph beside the tensors of the torch module that it was exported from."""

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

from dyexport.exporters.operator_gate import MODULE

Arrays = Mapping[str, np.ndarray]


class Pair(NamedTuple):
    """One tensor as both compute it; ``module`` is the torch module whose nodes make it, '' for the network itself."""

    module: str
    onnx: np.ndarray
    torch: np.ndarray


@dataclass(frozen=True, kw_only=True)
class ModuleBoundaries:
    """Where values cross from one torch module to another.

    ``producers`` is the module that makes each value, in the order of the graph; ``entering`` and ``leaving`` are the
    values that cross into a module and out of it, by its name; ``sorts`` are the outputs of TopK nodes, ``outputs``
    those of the graph.
    """

    producers: Mapping[str, str]
    entering: Mapping[str, Sequence[str]]
    leaving: Mapping[str, Sequence[str]]
    sorts: Sequence[tuple[str, str]]
    outputs: Sequence[str]

    @property
    def values(self) -> list[str]:
        """All of them, in the order of the graph."""
        crossing = {name for side in (self.entering, self.leaving) for names in side.values() for name in names}
        wanted = crossing.union(self.outputs, *self.sorts)
        return [name for name in self.producers if name in wanted]


def find_boundaries(model: onnx.ModelProto) -> ModuleBoundaries:
    """Read off the names of modules that export leaves at every node."""
    scopes = [_scopes(node) for node in model.graph.node]
    makers = {name: index for index, node in enumerate(model.graph.node) for name in node.output}
    entering: dict[str, dict[str, None]] = defaultdict(dict)
    leaving: dict[str, dict[str, None]] = defaultdict(dict)

    def cross(name: str, inside: Sequence[str]) -> None:
        outside = scopes[makers[name]]
        for scope in set(inside) - set(outside):
            entering[scope][name] = None
        for scope in set(outside) - set(inside):
            leaving[scope][name] = None

    for node, inside in zip(model.graph.node, scopes, strict=True):
        for name in node.input:
            if name in makers:
                cross(name, inside)
    for value in model.graph.output:
        cross(value.name, ())
    return ModuleBoundaries(
        producers={name: (scopes[index] or ("",))[0] for name, index in makers.items()},
        entering={scope: list(names) for scope, names in entering.items()},
        leaving={scope: list(names) for scope, names in leaving.items()},
        sorts=[(node.output[0], node.output[1]) for node in model.graph.node if node.op_type == "TopK"],
        outputs=[value.name for value in model.graph.output],
    )


def _scopes(node: onnx.NodeProto) -> tuple[str, ...]:
    """``blocks.0.fc1`` is in ``blocks.0.fc1``, ``blocks.0`` and ``blocks``."""
    module = next((entry.value for entry in node.metadata_props if entry.key == MODULE), "")
    parts = module.split(".") if module else []
    return tuple(".".join(parts[:length]) for length in range(len(parts), 0, -1))


def run_graph(path: Path, model: onnx.ModelProto, values: Sequence[str], feed: Arrays) -> dict[str, np.ndarray]:
    """``values`` of a graph, in ONNX Runtime on the CPU. What is looked at is not fused with what follows it."""
    import onnxruntime as ort
    from polygraphy.backend.onnx import modify_outputs
    from polygraphy.backend.onnxrt import OnnxrtRunner
    from polygraphy.logger import G_LOGGER

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        marked = modify_outputs(model, outputs=list(values), copy=True).SerializeToString()
        session = ort.InferenceSession(marked, options, providers=["CPUExecutionProvider"])
        with OnnxrtRunner(session) as runner:
            return dict(runner.infer(dict(feed)))


@dataclass
class Recorder:
    """What goes into every module of a torch network and what comes out of it, first call of each."""

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)

    def watch(self, module: nn.Module) -> None:
        for name, child in module.named_modules():
            if name:
                child.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            self.inputs.setdefault(name, list(_floats(inputs)))
            self.outputs.setdefault(name, list(_floats(output if isinstance(output, tuple) else (output,))))

        return hook


def _floats(values: Iterable[Any]) -> Iterator[Tensor]:
    return (value for value in values if isinstance(value, Tensor) and value.is_floating_point())


class ReplayTopK(TorchFunctionMode):
    """Has ``topk`` list its rows as another runtime did, since no order is agreed on.

    ``best`` are the scores that torch itself would have picked, sorted: if the other runtime's are the same, it
    picked the same rows.
    """

    def __init__(self, orders: Iterable[np.ndarray]) -> None:
        super().__init__()
        self.orders = iter(orders)
        self.best: list[np.ndarray] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is not torch.Tensor.topk:
            return found
        self.best.append(np.sort(found.values.numpy(), axis=1))
        index = torch.from_numpy(next(self.orders))  # (B, K)
        return torch.return_types.topk((args[0].gather(1, index), index))


@torch.no_grad()
def pair_up(path: Path, module: nn.Module, feed: Mapping[str, Tensor]) -> list[Pair]:
    """Run a graph and its module on the same inputs; every tensor that can be told apart, in the order of the graph."""
    model = onnx.load(path, load_external_data=False)
    borders = find_boundaries(model)
    theirs = run_graph(path, model, borders.values, {name: tensor.numpy() for name, tensor in feed.items()})
    recorder, order = Recorder(), ReplayTopK(theirs[index] for _, index in borders.sorts)
    recorder.watch(module)
    with order:
        results = module(**feed)
    results = results if isinstance(results, tuple) else (results,)
    ours = dict(zip(borders.outputs, (result.numpy() for result in results), strict=True))
    for (score, _), best in zip(borders.sorts, order.best, strict=True):
        theirs[score], ours[score] = np.sort(theirs[score], axis=1), best
    for name in recorder.outputs:
        ours |= _match(recorder.outputs[name], borders.leaving.get(name, ()), theirs)
        ours |= _match(recorder.inputs[name], borders.entering.get(name, ()), theirs)
    return [Pair(scope, theirs[name], ours[name]) for name, scope in borders.producers.items() if name in ours]


def _match(tensors: Sequence[Tensor], names: Sequence[str], theirs: Arrays) -> dict[str, np.ndarray]:
    """Tensors by the name of the value that has their shape, where there is one of each."""
    found = {}
    for tensor in tensors:
        alike = [other for other in tensors if other.shape == tensor.shape]
        fitting = [name for name in names if theirs[name].shape == tuple(tensor.shape) and _is_float(theirs[name])]
        if len(alike) == len(fitting) == 1:
            found[fitting[0]] = tensor.numpy()
    return found


def _is_float(array: np.ndarray) -> bool:
    return np.issubdtype(array.dtype, np.floating)
