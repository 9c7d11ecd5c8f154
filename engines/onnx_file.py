"""ONNX graphs as files: their bindings and weights, read without the weights themselves."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from google.protobuf.message import DecodeError

from dyexport.bundle.onnx_schema import DTYPES, MESSAGES, Message, tensor_spec
from dyexport.bundle.tensors import TensorSpec
from dyexport.engines.base import EngineIO, WeightSpan
from dyexport.errors import EngineBuildError


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A weight of a graph that is stored in a file: its name, dtype and shape, and its bytes."""

    spec: TensorSpec
    span: WeightSpan


def read_graph(path: Path) -> Message:
    """Read a ``ModelProto``. Raises ``EngineBuildError`` for a file that is missing or not one."""
    try:
        return MESSAGES["ModelProto"].FromString(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise EngineBuildError(f"cannot read {path}: {error}") from error


def graph_io(model: Message, path: Path) -> EngineIO:
    """Return the bindings of a graph. Raises ``EngineBuildError`` unless they are named tensors."""
    initialized = {tensor.name for tensor in model.graph.initializer}
    try:
        inputs = tuple(tensor_spec(value) for value in model.graph.input if value.name not in initialized)
        outputs = tuple(tensor_spec(value) for value in model.graph.output)
    except KeyError:  # an element type that ONNX does not have
        outputs = ()
    if not outputs or not all(isinstance(spec.name, str) for spec in (*inputs, *outputs)):  # bytes are not UTF-8
        raise EngineBuildError(f"{path}: its inputs or outputs are not tensors; build the bundle again")
    return EngineIO(inputs=inputs, outputs=outputs)


def graph_weights(model: Message, path: Path) -> tuple[WeightSpan, ...]:
    """Return the byte ranges of every tensor that is stored outside the file of the graph.

    Raises ``EngineBuildError`` if they are outside the graph's folder or not a range of bytes.
    """
    spans = {_span(tensor, path) for tensor in _external_tensors(model)}
    return tuple(sorted(spans, key=lambda span: (span.path, span.offset)))


def stored_tensors(model: Message, path: Path) -> dict[str, StoredTensor]:
    """Return the weights of a graph that are stored outside its file, by name. Raises as ``graph_weights`` does."""
    return {
        tensor.name: StoredTensor(
            spec=TensorSpec(name=tensor.name, dtype=DTYPES.get(tensor.data_type, "unknown"), shape=tuple(tensor.dims)),
            span=_span(tensor, path),
        )
        for tensor in _external_tensors(model)
    }


def resolve_weights(model: Message, path: Path) -> Path:
    """Resolve links in the names of a graph's weight files; return the folder that the names are relative to.

    ONNX Runtime follows no link out of that folder, and a file in the hub's cache is a link to one of another name.
    """
    entries = [
        entry for tensor in _external_tensors(model) for entry in tensor.external_data if entry.key == "location"
    ]
    real = {entry.value: os.path.realpath(path.parent / entry.value) for entry in entries}
    folder = os.path.commonpath([os.path.dirname(file) for file in real.values()] or [path.parent])
    for entry in entries:
        entry.value = os.path.relpath(real[entry.value], folder)
    return Path(folder)


def _external_tensors(model: Message) -> Iterator[Message]:
    for graph in (model.graph, *model.functions):
        yield from (tensor for tensor in _tensors(graph) if tensor.external_data)


def _tensors(graph: Message) -> Iterator[Message]:
    """Yield initializers, and tensors among attributes of nodes, at any depth; also of a ``FunctionProto``."""
    yield from getattr(graph, "initializer", ())
    for sparse in getattr(graph, "sparse_initializer", ()):
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def _span(tensor: Message, path: Path) -> WeightSpan:
    fields = {str(entry.key): str(entry.value) for entry in tensor.external_data}  # bytes where they are not UTF-8
    location = PurePosixPath(fields.get("location", ""))
    if len(fields) != len(tensor.external_data) or not location.name:
        raise EngineBuildError(f"{path}: weight {tensor.name} does not name its file; build the bundle again")
    if location.is_absolute() or ".." in location.parts:
        raise EngineBuildError(f"{path}: weight {tensor.name} is in {location}, outside the bundle; build it again")
    numbers = fields.get("offset", "0"), fields.get("length", "")
    if not all(re.fullmatch("[0-9]{1,18}", number) for number in numbers):
        place = "offset {!r} and length {!r}".format(*numbers)
        raise EngineBuildError(
            f"{path}: weight {tensor.name} has {place}, not numbers of bytes; build the bundle again"
        )
    offset, length = map(int, numbers)
    return WeightSpan(path=path.parent / location, offset=offset, length=length)
