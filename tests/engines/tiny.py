"""A network small enough to write by hand, as numpy and as an ONNX graph.

It has what a bundle has: blocks of heads and groups, some of them gone, some gated, kept-token counts and
slots, and a conditioning network, which embeds the class and passes the time on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from dyexport.bundle.plan import Segment
from dyexport.bundle.tensors import TensorSpec
from dyexport.engines.base import EngineIO, Tensors

DEPTH, HEADS, GROUPS = 2, 4, 4
CHANNELS, SIZE, CLASSES = 2, 2, 10
FEATURES = CHANNELS * SIZE * SIZE
MODULATION = FEATURES + 1  # the class embedding and t


@dataclass(frozen=True)
class Weights:
    """first, second (L, units, F), time (L, units), classes (CLASSES + 1, F); units are heads, then groups."""

    first: np.ndarray
    second: np.ndarray
    time: np.ndarray
    classes: np.ndarray


def make_weights(seed: int = 0, end: float = 1000.0) -> Weights:
    rng = np.random.default_rng(seed)
    shape = (DEPTH, HEADS + GROUPS, FEATURES)
    first, second = rng.normal(size=(2, *shape)).astype(np.float32) / 3
    time = (rng.normal(size=shape[:2]) / end).astype(np.float32)
    return Weights(first, second, time, rng.normal(size=(CLASSES + 1, FEATURES)).astype(np.float32))


def whole_segment(gated: bool = True) -> Segment:
    """Every unit is there."""
    return Segment(
        start=0.0,
        end=1000.0,
        heads=(tuple(range(HEADS)),) * DEPTH,
        groups=(tuple(range(GROUPS)),) * DEPTH,
        gated_heads=(gated,) * DEPTH,
        gated_groups=(gated,) * DEPTH,
        token_paths=("all",) * DEPTH,
        capacities=(FEATURES,) * DEPTH,
    )


def kept_units(segment: Segment, block: int) -> list[int]:
    return [*segment.heads[block], *(HEADS + group for group in segment.groups[block])]


def reference(
    weights: Weights, inputs: dict[str, torch.Tensor], heads: np.ndarray, groups: np.ndarray, slots: int = 0
) -> dict[str, torch.Tensor]:
    """The masked network: all units, times the masks heads (L, H) and groups (L, G)."""
    x = inputs["hidden_states"].flatten(1) + inputs["modulation"][:, :FEATURES]  # (B, F)
    kept = []
    for block in range(DEPTH):
        mask = torch.from_numpy(np.concatenate([heads[block], groups[block]]).astype(np.float32))  # (units,)
        kept.append((x > 0).sum(1))
        time = inputs["modulation"][:, FEATURES:] * torch.from_numpy(weights.time[block])  # (B, units)
        hidden = (x @ torch.from_numpy(weights.first[block]).T + time).relu() * mask  # (B, units)
        x = x + hidden @ torch.from_numpy(weights.second[block])  # (B, F)
    return {"sample": x.reshape(-1, CHANNELS, SIZE, SIZE) + 0.01 * slots, "kept_tokens": torch.stack(kept, 1)}


def modulate(weights: Weights, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
    """The conditioning network: t (R,), labels (R,) -> (R, M)."""
    return torch.cat([torch.from_numpy(weights.classes)[class_labels], timestep[:, None]], dim=1)


def gate_slices(segment: Segment) -> list[tuple[int, int]]:
    """Where each block's gates lie in ``width_gate``. Here a segment is gated everywhere or nowhere."""
    ends = np.cumsum([len(kept_units(segment, block)) for block in range(DEPTH)]).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def tiny_io(segment: Segment) -> EngineIO:
    shape: tuple[int | str, ...] = ("batch", CHANNELS, SIZE, SIZE)
    inputs = [
        TensorSpec(name="hidden_states", dtype="float32", shape=shape),
        TensorSpec(name="modulation", dtype="float32", shape=("batch", MODULATION)),
    ]
    if segment.gate_size:
        inputs.append(TensorSpec(name="width_gate", dtype="float32", shape=(segment.gate_size,)))
    if segment.slot_buckets:
        inputs.append(TensorSpec(name="slots", dtype="float32", shape=("slots",)))
    outputs = (
        TensorSpec(name="sample", dtype="float32", shape=shape),
        TensorSpec(name="kept_tokens", dtype="int64", shape=("batch", DEPTH)),
    )
    return EngineIO(inputs=tuple(inputs), outputs=outputs)


class Store:
    """A weight store that grows: arrays one after another in one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def add(self, array: np.ndarray) -> int:
        with self.path.open("ab") as file:
            offset = file.tell()
            file.write(np.ascontiguousarray(array).tobytes())
        return offset


def stored(name: str, array: np.ndarray, store: Store) -> TensorProto:
    """An array as a reference into the store."""
    tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
    tensor.data_location = TensorProto.EXTERNAL
    fields = {"location": store.path.name, "offset": store.add(array), "length": array.nbytes}
    for key, value in fields.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def write_onnx(path: Path, weights: Weights, segment: Segment, store: Store) -> None:
    io, nodes, initializers = tiny_io(segment), [], []

    def weight(name: str, array: np.ndarray) -> str:
        initializers.append(stored(name, array, store))
        return name

    def constant(name: str, values: list[int] | float, dtype: type = np.int64) -> str:
        initializers.append(onnx.numpy_helper.from_array(np.array(values, dtype), name))
        return name

    def op(kind: str, *inputs: str, out: str, **attributes: int) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [out], **attributes))
        return out

    one, zero = constant("one", [1]), constant("zero", 0.0, np.float32)
    parts = constant("parts", [FEATURES, 1])
    nodes.append(helper.make_node("Split", ["modulation", parts], ["label", "time"], axis=1))
    x, time = op("Add", op("Flatten", "hidden_states", out="flat"), "label", out="x"), "time"
    kept = []
    for b, (start, stop) in enumerate(gate_slices(segment)):
        units = kept_units(segment, b)
        positive = op("Cast", op("Greater", x, zero, out=f"positive{b}"), out=f"count{b}", to=TensorProto.INT64)
        kept.append(op("ReduceSum", positive, one, out=f"kept{b}", keepdims=1))
        linear = op("Gemm", x, weight(f"first{b}", weights.first[b][units]), out=f"linear{b}", transB=1)
        timed = op("Mul", time, weight(f"time{b}", weights.time[b][units]), out=f"timed{b}")
        hidden = op("Relu", op("Add", linear, timed, out=f"sum{b}"), out=f"hidden{b}")
        if segment.gate_size:
            bounds = constant(f"start{b}", [start]), constant(f"stop{b}", [stop])
            hidden = op("Mul", hidden, op("Slice", "width_gate", *bounds, out=f"gate{b}"), out=f"gated{b}")
        branch = op("Gemm", hidden, weight(f"second{b}", weights.second[b][units]), out=f"branch{b}")
        x = op("Add", x, branch, out=f"x{b}")
    sample = op("Reshape", x, constant("shape", [-1, CHANNELS, SIZE, SIZE]), out="shaped")
    if segment.slot_buckets:
        count = op("Cast", op("Size", "slots", out="slot_count"), out="slot_float", to=TensorProto.FLOAT)
        shift = op("Mul", count, constant("per_slot", 0.01, np.float32), out="shift")
        sample = op("Add", sample, shift, out="shifted")
    op("Identity", sample, out="sample")
    op("Concat", *kept, out="kept_tokens", axis=1)
    _save(path, nodes, io, initializers)


def write_conditioning_onnx(path: Path, weights: Weights, store: Store) -> None:
    io = conditioning_io()
    nodes = [
        helper.make_node("Gather", ["classes", "class_labels"], ["label"]),
        helper.make_node("Unsqueeze", ["timestep", "one"], ["time"]),
        helper.make_node("Concat", ["label", "time"], ["modulation"], axis=1),
    ]
    one = onnx.numpy_helper.from_array(np.array([1]), "one")
    _save(path, nodes, io, [stored("classes", weights.classes, store), one])


def conditioning_io() -> EngineIO:
    inputs = (
        TensorSpec(name="timestep", dtype="float32", shape=("rows",)),
        TensorSpec(name="class_labels", dtype="int64", shape=("rows",)),
    )
    return EngineIO(
        inputs=inputs, outputs=(TensorSpec(name="modulation", dtype="float32", shape=("rows", MODULATION)),)
    )


def _save(path: Path, nodes: list[onnx.NodeProto], io: EngineIO, initializers: list[TensorProto]) -> None:
    inputs, outputs = ([_value(spec) for spec in specs] for specs in (io.inputs, io.outputs))
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(path, full_check=True)


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(spec.name, helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype)), spec.shape)


def t_of(inputs: Tensors) -> float:
    """The t that inputs are for."""
    return float(inputs["modulation"][0, FEATURES])


def make_inputs(batch: int, segment: Segment | None = None, t: float = 300.0, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, CHANNELS, SIZE, SIZE, generator=generator)
    labels = torch.randn(batch, FEATURES, generator=generator)
    inputs = {"hidden_states": hidden, "modulation": torch.cat([labels, torch.full((batch, 1), t)], dim=1)}
    if segment is not None and segment.gate_size:
        inputs["width_gate"] = (torch.rand(segment.gate_size, generator=generator) > 0.5).float()
    return inputs
