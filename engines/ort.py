"""ONNX Runtime, on the CPU or on CUDA. The weights stay in the file beside the graph."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from dyexport.bundle.tensors import TensorSpec
from dyexport.engines.base import Engine, EngineIO, Tensors, WeightSpan
from dyexport.errors import DyexportError, EngineBuildError, EngineMismatchError, MissingDependencyError, reason

if TYPE_CHECKING:
    import onnx
    import torch

Providers = list[str | tuple[str, dict[str, Any]]]


class OrtEngine(Engine):
    """Runs one ONNX graph.

    ``share_weights`` leaves the weights in the mapped file, so that any number of engines over one
    file hold them once, and lets these engines share one arena of activations; without it ONNX
    Runtime copies them into the layout its kernels like best. ``threads`` defaults to torch's.
    ``rewrite`` is applied to the graph, without its weights, each time it is activated.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str = "cpu",
        share_weights: bool = False,
        threads: int | None = None,
        rewrite: Callable[[onnx.ModelProto], onnx.ModelProto] | None = None,
    ) -> None:
        self.path = path
        self.device = device
        self._device_type = device.partition(":")[0]
        self._share_weights = share_weights
        self._threads = threads
        self._rewrite = rewrite
        self._session: Any = None
        self._folder = path.parent  # that the graph's weights are named from

    @cached_property
    def io(self) -> EngineIO:
        try:
            return graph_io(read_graph(self.path))
        except (KeyError, ValueError) as error:  # a type that ONNX does not have, or a name that is no text
            raise EngineBuildError(
                f"{self.path}: its inputs or outputs are no tensors; build the bundle again"
            ) from error

    @cached_property
    def weights(self) -> tuple[WeightSpan, ...]:
        return graph_weights(read_graph(self.path), self.path)

    @property
    def shares_weights(self) -> bool:
        return self._share_weights and self._device_type == "cpu"

    @property
    def active(self) -> bool:
        return self._session is not None

    def activate(self) -> None:
        if self._session is not None:
            return
        ort = load_onnxruntime()
        model = read_graph(self.path)
        graph_weights(model, self.path)  # refuses weights outside the bundle before anything reads them
        if self._device_type == "cpu":
            _check_kernels(model, self.path)
        if self._rewrite is not None:
            model = self._rewrite(model)
        self._folder = resolve_weights(model, self.path)
        with vendor_errors(EngineBuildError, f"ONNX Runtime cannot load {self.path}"):
            self._session = self._start(ort, model)

    def _start(self, ort: Any, model: onnx.ModelProto) -> Any:
        """A session on this engine's execution provider."""
        providers = providers_for(self.device, ort.get_available_providers())
        return ort.InferenceSession(model.SerializeToString(), self._options(ort), providers=providers)

    def _options(self, ort: Any) -> Any:
        import torch

        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads or torch.get_num_threads()
        options.add_session_config_entry("session.x64quantprecision", "1")  # else int8 may saturate without VNNI
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._folder))
        if self.shares_weights:
            # Without prepacking the weights stay file pages; an arena of its own would hold activations per session.
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.add_session_config_entry("session.use_env_allocators", "1")
            _register_shared_arena()
        return options

    def run(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        shapes = self.io.output_shapes(self.io.check(inputs))
        inputs = {name: tensor.detach().contiguous() for name, tensor in inputs.items()}
        outputs = {spec.name: self._empty(spec, shapes[spec.name]) for spec in self.io.outputs}
        self.activate()
        binding = self._session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_input(name, **self._location(name, tensor))
        for name, tensor in outputs.items():
            binding.bind_output(name, **self._location(name, tensor))
        self._synchronise()
        with vendor_errors(EngineMismatchError, f"ONNX Runtime cannot run {self.path}"):
            self._session.run_with_iobinding(binding)
        return outputs

    def close(self) -> None:
        self._session = None

    def _empty(self, spec: TensorSpec, shape: tuple[int, ...]) -> torch.Tensor:
        import torch

        return torch.empty(shape, dtype=getattr(torch, spec.dtype), device=self.device)

    def _location(self, name: str, tensor: torch.Tensor) -> dict[str, Any]:
        """What binds a tensor in place: nothing is copied on its way in or out."""
        if tensor.device.type != self._device_type:
            raise EngineMismatchError(f"{name} is on {tensor.device}, the engine on {self.device}")
        return {
            "device_type": tensor.device.type,
            "device_id": tensor.device.index or 0,
            "element_type": _onnx_dtype(tensor.dtype),
            "shape": list(tensor.shape),
            "buffer_ptr": tensor.data_ptr(),
        }

    def _synchronise(self) -> None:
        """ONNX Runtime works on a stream of its own, which does not wait for torch's."""
        if self._device_type == "cuda":
            import torch

            torch.cuda.current_stream(self.device).synchronize()


def has_cuda() -> bool:
    return "CUDAExecutionProvider" in load_onnxruntime().get_available_providers()


def providers_for(device: str, available: Sequence[str]) -> Providers:
    """Execution providers for ``cpu``, ``cuda`` or ``cuda:N``; CUDA falls back to the CPU operator by operator."""
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return ["CPUExecutionProvider"]
    if kind != "cuda":
        raise EngineMismatchError(f"ONNX Runtime engines run on cpu or cuda, not on {device!r}")
    if "CUDAExecutionProvider" not in available:
        raise MissingDependencyError("onnxruntime-gpu", "gpu")
    return [("CUDAExecutionProvider", {"device_id": int(index or 0)}), "CPUExecutionProvider"]


def read_graph(path: Path) -> onnx.ModelProto:
    """The graph without its weights."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]

    try:
        return onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise EngineBuildError(f"cannot read {path}: {error}") from error


def _check_kernels(model: onnx.ModelProto, path: Path) -> None:
    """Raises ``EngineMismatchError`` for a graph in bf16, of which ONNX Runtime's own error names one node."""
    from onnx import TensorProto

    if any(tensor.data_type == TensorProto.BFLOAT16 for tensor in model.graph.initializer):
        raise EngineMismatchError(
            f"{path} is in bf16, for which ONNX Runtime has no CPU kernels; "
            "run it with device='cuda', or build with --precision fp32 or fp16"
        )


def graph_io(model: onnx.ModelProto) -> EngineIO:
    initialised = {tensor.name for tensor in model.graph.initializer}
    inputs = tuple(_spec(value) for value in model.graph.input if value.name not in initialised)
    outputs = tuple(_spec(value) for value in model.graph.output)
    if not outputs or not all(isinstance(spec.name, str) for spec in (*inputs, *outputs)):  # bytes are no UTF-8
        raise ValueError("a graph has outputs, and names that are text")
    return EngineIO(inputs=inputs, outputs=outputs)


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    from onnx.helper import tensor_dtype_to_np_dtype

    tensor = value.type.tensor_type
    dims = enumerate(tensor.shape.dim)
    shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or f"{value.name}_{axis}" for axis, d in dims)
    return TensorSpec(name=value.name, dtype=str(tensor_dtype_to_np_dtype(tensor.elem_type)), shape=shape)


def graph_weights(model: onnx.ModelProto, path: Path) -> tuple[WeightSpan, ...]:
    """Bytes of every tensor that is not in the graph itself.

    Raises ``EngineBuildError`` where they lie outside the graph's folder or are not a run of bytes.
    """
    spans = {_span(tensor, path) for tensor in _weights(model)}
    return tuple(sorted(spans, key=lambda span: (span.path, span.offset)))


def _weights(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Tensors whose bytes are in another file."""
    for graph in (model.graph, *model.functions):
        yield from (tensor for tensor in _tensors(graph) if tensor.external_data)


def _tensors(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.TensorProto]:
    """Initializers, and tensors among the attributes of nodes, at any depth."""
    if (initializers := getattr(graph, "initializer", None)) is not None:
        yield from initializers
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def _span(tensor: onnx.TensorProto, path: Path) -> WeightSpan:
    fields = {str(entry.key): str(entry.value) for entry in tensor.external_data}  # bytes where they are no UTF-8
    location = PurePosixPath(fields.get("location", ""))
    if len(fields) != len(tensor.external_data) or not location.name:
        raise EngineBuildError(f"{path}: weight {tensor.name} does not say where it lies; build the bundle again")
    if location.is_absolute() or ".." in location.parts:
        raise EngineBuildError(f"{path}: weight {tensor.name} lies in {location}, outside the bundle; build it again")
    numbers = fields.get("offset", "0"), fields.get("length", "")
    if not all(re.fullmatch("[0-9]{1,18}", number) for number in numbers):
        place = "offset {!r} and length {!r}".format(*numbers)
        raise EngineBuildError(f"{path}: weight {tensor.name} has {place}, no numbers of bytes; build the bundle again")
    offset, length = map(int, numbers)
    return WeightSpan(path=path.parent / location, offset=offset, length=length)


def resolve_weights(model: onnx.ModelProto, path: Path) -> Path:
    """Have a graph name its weights where they are without links; returns the folder that it then names them from.

    ONNX Runtime follows no link out of that folder, and a file in the hub's cache is a link to one of another name.
    """
    entries = [entry for tensor in _weights(model) for entry in tensor.external_data if entry.key == "location"]
    real = {entry.value: os.path.realpath(path.parent / entry.value) for entry in entries}
    folder = os.path.commonpath([os.path.dirname(file) for file in real.values()] or [path.parent])
    for entry in entries:
        entry.value = os.path.relpath(real[entry.value], folder)
    return Path(folder)


@cache
def _onnx_dtype(dtype: torch.dtype) -> int:
    import numpy as np
    from onnx import TensorProto
    from onnx.helper import np_dtype_to_tensor_dtype

    name = str(dtype).removeprefix("torch.")
    return TensorProto.BFLOAT16 if name == "bfloat16" else np_dtype_to_tensor_dtype(np.dtype(name))


@cache
def load_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError("onnxruntime", "cpu") from error
    return onnxruntime


@cache
def _register_shared_arena() -> None:
    """Once in a process: the allocator that sessions with ``use_env_allocators`` share."""
    ort = load_onnxruntime()
    kind = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(kind, None)


@cache
def _their_errors() -> tuple[type[Exception], ...]:
    values = vars(load_onnxruntime().capi.onnxruntime_pybind11_state).values()
    theirs = [value for value in values if isinstance(value, type) and issubclass(value, Exception)]
    return (*theirs, RuntimeError, ValueError)


@contextmanager
def vendor_errors(mapped: type[DyexportError], what: str) -> Iterator[None]:
    """Everything ONNX Runtime raises becomes ``mapped``."""
    try:
        yield
    except _their_errors() as error:
        raise mapped(f"{what}: {reason(error)}") from error
