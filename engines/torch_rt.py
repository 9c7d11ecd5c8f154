"""Packages of AOTInductor, in torch on the CPU or on CUDA. CUDA is untested.

A package is code that was compiled for one version of torch and one kind of processor. It has no weights: they are
passed as its first inputs, and stay in the bundle's weight store.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from dyexport.bundle.package_info import PACKAGE_INFO, Machine, PackageInfo, machine_of
from dyexport.engines.base import Engine, EngineIO, Tensors, WeightSpan
from dyexport.engines.onnx_file import StoredTensor, graph_weights, read_graph, stored_tensors
from dyexport.engines.torch_weights import HeldWeights, StoredWeights
from dyexport.errors import EngineBuildError, EngineMismatchError, reason

if TYPE_CHECKING:
    import torch

ALIGNMENT = 16  # bytes, that compiled code may rely on
PROCESS = os.getpid()  # that imported this module; another one was forked from it
CURE = "compile the bundle here: dyexport compile BUNDLE --target torch"


class TorchEngine(Engine):
    """Engine over one package, ``engines/torch/NETWORK/model.pt2`` of a bundle.

    The network's ONNX graph says where its weights are. Loading the package runs code from it, so its bundle is always
    opened with hashes checked. ``park`` keeps the code, which is small.
    """

    def __init__(self, path: Path, *, store: StoredWeights, device: str = "cpu") -> None:
        self.path = path
        self.device = device
        self._store = store
        self._runner: Any = None
        self._running = Lock()
        self._held: HeldWeights | None = None
        self._weights: list[torch.Tensor] = []  # in the order of the package's inputs

    @cached_property
    def info(self) -> PackageInfo:
        return package_info(self.path)

    @cached_property
    def io(self) -> EngineIO:
        return EngineIO(inputs=self.info.inputs, outputs=self.info.outputs)

    @cached_property
    def _stored(self) -> dict[str, StoredTensor]:
        graph = graph_of(self.path)
        stored = stored_tensors(read_graph(graph), graph)
        if different := stored.keys() ^ set(self.info.weights):
            raise EngineMismatchError(f"{self.path} and {graph} differ in weight {min(different)}; {CURE}")
        return stored

    @cached_property
    def weights(self) -> tuple[WeightSpan, ...]:
        return self._store.spans_of(self._stored)

    @property
    def shares_weights(self) -> bool:
        return True

    @property
    def active(self) -> bool:
        return self._held is not None

    def activate(self) -> None:
        """Load the code, and map the weights. Raises ``EngineMismatchError`` for code of another version or processor.

        ``EngineBuildError`` for a package that torch cannot load.
        """
        if self._held is not None:
            return
        if (problem := incompatibility(self.path)) is not None:
            raise EngineMismatchError(f"{self.path}: {problem}")
        if self._runner is None:
            self._runner = _load(self.path, self.device)
        held = self._store.hold(self._stored)
        self._weights = [held.weights[name] for name in self.info.weights]
        self._held = held

    def run(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        import torch

        self._check(inputs)
        self.activate()
        _leave_threads_of_parent()
        tensors = [*self._weights, *(_aligned(inputs[spec.name]) for spec in self.io.inputs)]
        try:
            # A run that waits for another one keeps the interpreter's lock, which the other one needs to free a tensor.
            with self._running, torch.no_grad():
                outputs = self._runner.boxed_run(tensors)
        except RuntimeError as error:
            raise EngineMismatchError(f"torch cannot run {self.path}: {reason(error)}") from error
        return {spec.name: value for spec, value in zip(self.io.outputs, outputs, strict=True)}

    def _check(self, inputs: Tensors) -> None:
        """Raise ``EngineMismatchError`` for inputs that compiled code would read wrongly."""
        symbols = self.io.check(inputs)
        for name, size in symbols.items():
            low, high = self.info.floors.get(name, 1), self.info.limits.get(name, size)
            if not low <= size <= high:
                raise EngineMismatchError(f"{name} is {size}, and the engine takes {low} to {high}")
        kind = self.device.partition(":")[0]
        if elsewhere := [name for name, tensor in inputs.items() if tensor.device.type != kind]:
            raise EngineMismatchError(
                f"{elsewhere[0]} is on {inputs[elsewhere[0]].device}, the engine on {self.device}"
            )

    def park(self) -> None:
        self._held, self._weights = None, []

    def close(self) -> None:
        self.park()
        self._runner = None


def make_engines(paths: Sequence[Path], device: str) -> list[Engine]:
    """Make engines that share the weights of their bundle."""

    def find_spans() -> list[WeightSpan]:
        graphs = [graph_of(path) for path in paths]
        return [span for graph in graphs for span in graph_weights(read_graph(graph), graph)]

    store = StoredWeights(device, find_spans)
    return [TorchEngine(path, store=store, device=device) for path in paths]


def graph_of(path: Path) -> Path:
    """Return the ONNX graph of a package's network."""
    network = path.parent
    return network.parent.parent.parent / "graphs" / f"{network.name}.onnx"


def package_info(path: Path) -> PackageInfo:
    """Read the description next to a package. Raises ``EngineMismatchError``."""
    return PackageInfo.read(path.with_name(PACKAGE_INFO))


def device_of(path: Path) -> str:
    """Return ``cpu`` or ``cuda``, which a package was compiled for."""
    return package_info(path).machine.device


def incompatibility(path: Path) -> str | None:
    """Explain why a package cannot run here and what to do; None if it can."""
    import torch

    info = package_info(path)
    if info.machine.device == "cuda" and not torch.cuda.is_available():
        return f"compiled for CUDA, and torch sees no GPU; {CURE}"
    return mismatch(info, torch.__version__, machine_of(info.machine.device))


def mismatch(info: PackageInfo, version: str, machine: Machine) -> str | None:
    """Explain why compiled code does not match this torch and this processor; None if it does."""
    if info.version != version:
        return f"compiled by torch {info.version}, and {version} is installed; {CURE}"
    if info.machine.capability != machine.capability:
        return f"compiled for {info.machine.capability}, and this machine has {machine.capability}; {CURE}"
    if missing := set(info.machine.features) - set(machine.features):
        return f"compiled for a CPU with {min(missing)}, which this one lacks; {CURE}"
    return None


def _load(path: Path, device: str) -> Any:
    import torch

    index = -1 if device == "cpu" else torch.device(device).index or 0
    try:
        return torch._inductor.aoti_load_package(str(path), device_index=index).loader
    except Exception as error:  # raised by many libraries
        raise EngineBuildError(f"torch cannot load {path}: {reason(error)}") from error


def _leave_threads_of_parent() -> None:
    """Use one thread in a forked process, as torch's data loaders do: OpenMP would wait for threads of the parent."""
    import torch

    if os.getpid() != PROCESS and torch.get_num_threads() > 1:
        torch.set_num_threads(1)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor that starts where compiled code expects it to."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()
