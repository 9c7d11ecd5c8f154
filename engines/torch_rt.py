"""Torch as an engine: runs a segment's exported program with its weights bound from the store.

The file is an archive of ``torch.export.save`` with one extra file, ``engine.json``:

    {"store": "weights.bin",
     "inputs":  [{"name": "hidden_states", "dtype": "float32", "shape": ["batch", 4, 32, 32]}, ...],
     "outputs": [{"name": "sample", "dtype": "float32", "shape": ["batch", 8, 32, 32]}, ...],
     "weights": {"blocks.0.attn.to_q.weight": {"offset": 0, "shape": [384, 384], "dtype": "float32"}, ...}}

``weights`` has every name of the program's ``state_dict``; each lies in row-major order at ``offset``
bytes of ``store``, a file in the archive's folder. In the archive itself these tensors are on the meta
device, as they are when the module was exported from there; other constants must have values. The
program takes its inputs by name, and returns its outputs as a tuple in the order of ``outputs``.
"""

from __future__ import annotations

from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, ValidationError

from dyexport.bundle.manifest import BundlePath, Frozen
from dyexport.bundle.tensors import TensorSpec
from dyexport.engines.base import Engine, EngineIO, Tensors, WeightSpan
from dyexport.engines.pt2 import load_program, read_extra
from dyexport.errors import EngineBuildError, EngineMismatchError

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule

DType = Literal["float32", "float16", "bfloat16", "int64", "int32", "bool"]
Size = Annotated[int, Field(ge=0)]


class Binding(Frozen):
    name: str
    dtype: DType
    shape: tuple[int | str, ...]


class StoredWeight(Frozen):
    offset: Size
    shape: tuple[Size, ...]
    dtype: DType


class ProgramRecord(Frozen):
    """``engine.json``."""

    store: BundlePath
    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]
    weights: dict[str, StoredWeight]


class TorchEngine(Engine):
    """Runs one exported program; on the CPU its weights are views of the mapped store."""

    def __init__(self, path: Path, *, device: str = "cpu") -> None:
        self.path = path
        self.device = device
        self._module: GraphModule | None = None

    @cached_property
    def record(self) -> ProgramRecord:
        try:
            return ProgramRecord.model_validate_json(read_extra(self.path, "engine.json"))
        except ValidationError as error:
            raise EngineBuildError(f"{self.path}: engine.json: {error.errors()[0]['msg']}") from error

    @cached_property
    def io(self) -> EngineIO:
        inputs, outputs = self.record.inputs, self.record.outputs
        return EngineIO(inputs=tuple(_spec(item) for item in inputs), outputs=tuple(_spec(item) for item in outputs))

    @cached_property
    def weights(self) -> tuple[WeightSpan, ...]:
        path = self.path.parent / self.record.store
        spans = {WeightSpan(path=path, offset=w.offset, length=_length(w)) for w in self.record.weights.values()}
        return tuple(sorted(spans, key=lambda span: span.offset))

    @property
    def shares_weights(self) -> bool:
        return self.device == "cpu"

    @property
    def active(self) -> bool:
        return self._module is not None

    def activate(self) -> None:
        if self._module is None:
            self._module = self._load()

    def _load(self) -> GraphModule:
        import torch

        if self.device != "cpu" and not torch.cuda.is_available():
            raise EngineMismatchError(f"torch sees no CUDA device for an engine on {self.device}; use device='cpu'")
        module = load_program(self.path).module(
            check_guards=False
        )  # guards are source text, and io.check does their work
        try:
            module.load_state_dict(self._views(), assign=True)
        except RuntimeError as error:
            raise EngineBuildError(f"{self.path}: {' '.join(str(error).split())}") from error
        return _moved(module, self.device)

    def _views(self) -> dict[str, torch.Tensor]:
        import torch

        path = self.path.parent / self.record.store
        if not path.is_file():
            raise EngineBuildError(f"{path} is missing; export the bundle again")
        store = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)  # (bytes,)
        return {name: self._view(store, name, weight) for name, weight in self.record.weights.items()}

    def _view(self, store: torch.Tensor, name: str, weight: StoredWeight) -> torch.Tensor:
        import torch

        end = weight.offset + _length(weight)
        if end > len(store):
            raise EngineBuildError(f"{self.path}: weight {name} ends at byte {end}, the store has {len(store)}")
        return store[weight.offset : end].view(getattr(torch, weight.dtype)).view(weight.shape)

    def run(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        import torch

        self.io.check(inputs)
        self.activate()
        assert self._module is not None
        for name, tensor in inputs.items():
            if tensor.device.type != torch.device(self.device).type:
                raise EngineMismatchError(f"{name} is on {tensor.device}, the engine on {self.device}")
        try:
            with torch.no_grad():
                outputs = self._module(**inputs)
        except (RuntimeError, IndexError) as error:
            raise EngineMismatchError(f"torch cannot run {self.path}: {error}") from error
        if len(outputs) != len(self.io.outputs):
            raise EngineBuildError(
                f"{self.path} returns {len(outputs)} outputs, engine.json names {len(self.io.outputs)}"
            )
        return {spec.name: value for spec, value in zip(self.io.outputs, outputs, strict=True)}

    def close(self) -> None:
        self._module = None


def _spec(binding: Binding) -> TensorSpec:
    return TensorSpec(name=binding.name, dtype=binding.dtype, shape=binding.shape)


def _length(weight: StoredWeight) -> int:
    import torch

    return prod(weight.shape) * int(getattr(torch, weight.dtype).itemsize)


def _moved(module: GraphModule, device: str) -> GraphModule:
    """The program on a device: its weights, and the tensors that it creates where it was exported."""
    for node in module.graph.nodes:
        if "device" in node.kwargs:
            node.update_kwarg("device", device)
    module.recompile()
    return module.to(device)
