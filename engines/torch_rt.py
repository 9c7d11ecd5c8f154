"""Torch as an engine: runs a segment's exported program with its weights bound from the store.

The file is an archive of ``torch.export.save`` with one extra file, ``engine.json``:

    {"store": "weights.bin",
     "inputs":  [{"name": "hidden_states", "dtype": "float32", "shape": ["batch", 4, 32, 32]}, ...],
     "outputs": [{"name": "sample", "dtype": "float32", "shape": ["batch", 8, 32, 32]}, ...],
     "weights": {"blocks.0.attn.to_q.weight": {"offset": 0, "shape": [384, 384], "dtype": "float32"}, ...}}

``weights`` has every name of the program's ``state_dict``; each lies in row-major order at ``offset``
bytes of ``store``, a file in the archive's folder, unless ``strides`` (in elements) says otherwise,
as it does for a weight that is stored transposed. In the archive itself these tensors are on the meta
device: before saving, put ``tensor.to("meta")`` in their place in ``program.state_dict``. The program
takes its inputs by name, and returns its outputs as a tuple in the order of ``outputs``.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, ValidationError

from dyexport.bundle import BundlePath, Frozen
from dyexport.engines.base import Engine, EngineIO, Tensors, TensorSpec, WeightSpan
from dyexport.engines.pt2 import load_program, read_extra
from dyexport.errors import EngineBuildError, EngineMismatch

if TYPE_CHECKING:
    import torch

DType = Literal["float32", "float16", "bfloat16", "int64", "int32", "bool"]
Size = Annotated[int, Field(ge=0)]


class Binding(Frozen):
    name: str
    dtype: DType
    shape: tuple[int | str, ...]


class StoredWeight(Frozen):
    """``strides`` of ``None`` mean row-major order."""

    offset: Size
    shape: tuple[Size, ...]
    dtype: DType
    strides: tuple[Size, ...] | None = None


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
        self._module: torch.nn.Module | None = None

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

    def _load(self) -> torch.nn.Module:
        import torch
        from torch.export.passes import move_to_device_pass

        if self.device != "cpu" and not torch.cuda.is_available():
            raise EngineMismatch(
                f"torch sees no CUDA device, the engine was asked for on {self.device}; use device='cpu'"
            )
        program = load_program(self.path)
        weights = self._views()
        if self.device != "cpu":
            program = move_to_device_pass(program, self.device)
            weights = {name: tensor.to(self.device) for name, tensor in weights.items()}
        module = program.module(check_guards=False)  # io.check has done it, and guards are evaluated source text
        try:
            module.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise EngineBuildError(f"{self.path}: {' '.join(str(error).split())}") from error
        return module

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
        flat = store[weight.offset : end].view(getattr(torch, weight.dtype))  # (elements,)
        return flat.as_strided(weight.shape, weight.strides or _row_major(weight.shape), flat.storage_offset())

    def run(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        import torch

        self.io.check(inputs)
        self.activate()
        assert self._module is not None
        for name, tensor in inputs.items():
            if tensor.device.type != torch.device(self.device).type:
                raise EngineMismatch(f"{name} is on {tensor.device}, the engine on {self.device}")
        try:
            with torch.no_grad():
                outputs = self._module(**inputs)
        except (RuntimeError, IndexError) as error:
            raise EngineMismatch(f"torch cannot run {self.path}: {error}") from error
        if len(outputs) != len(self.io.outputs):
            raise EngineBuildError(
                f"{self.path} returns {len(outputs)} outputs, engine.json names {len(self.io.outputs)}"
            )
        return {spec.name: value for spec, value in zip(self.io.outputs, outputs, strict=True)}

    def close(self) -> None:
        self._module = None


def _spec(binding: Binding) -> TensorSpec:
    return TensorSpec(name=binding.name, dtype=binding.dtype, shape=binding.shape)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return tuple(strides[: len(shape)])


def _length(weight: StoredWeight) -> int:
    """Bytes from the first element to the end of the last."""
    import torch

    if 0 in weight.shape:
        return 0
    strides = weight.strides or _row_major(weight.shape)
    last = sum((size - 1) * stride for size, stride in zip(weight.shape, strides, strict=True))
    return (last + 1) * getattr(torch, weight.dtype).itemsize
