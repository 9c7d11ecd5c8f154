"""ONNX Runtime on CUDA, as far as it is decided without a GPU: fixed addresses, what is captured, what is not."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from dyexport.engines.base import Tensors
from dyexport.engines.onnx_file import read_graph
from dyexport.engines.ort import OrtEngine, providers_for
from dyexport.engines.ort_buffers import BuffersByShape
from dyexport.engines.ort_cuda import RECORD_PROVIDERS, OrtCudaEngine, all_nodes_on, capturable
from dyexport.engines.registry import EngineOptions, make_engines
from dyexport.errors import EngineMismatchError
from tests.engines.tiny import (
    CLASSES,
    Store,
    make_inputs,
    make_weights,
    whole_segment,
    write_conditioning_onnx,
    write_onnx,
)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "segment-00.onnx"
    write_onnx(path, make_weights(), whole_segment(gated=False), Store(tmp_path / "weights.bin"))
    return path


@pytest.fixture
def conditioning(tmp_path: Path) -> Path:
    path = tmp_path / "conditioning.onnx"
    write_conditioning_onnx(path, make_weights(), Store(tmp_path / "weights.bin"))
    return path


class Binder:
    """Records what is bound."""

    def __init__(self) -> None:
        self.bound: list[tuple[Tensors, Tensors]] = []

    def __call__(self, inputs: Tensors, outputs: Tensors) -> int:
        self.bound.append((inputs, outputs))
        return len(self.bound)


def one_output() -> dict[str, torch.Tensor]:
    return {"y": torch.zeros(1)}


def test_buffers_are_made_when_shapes_come_back() -> None:
    bind = Binder()
    buffers = BuffersByShape(bind)
    first, second = {"x": torch.zeros(2)}, {"x": torch.ones(2)}
    assert buffers.find(first, one_output) is None
    made = buffers.find(second, one_output)
    assert made is not None
    assert torch.equal(made.inputs["x"], second["x"])
    assert made.inputs["x"].data_ptr() != second["x"].data_ptr()
    assert buffers.find(first, one_output) is made
    assert len(bind.bound) == len(buffers) == 1
    address = made.inputs["x"].data_ptr()
    made.fill(first)
    assert torch.equal(made.inputs["x"], first["x"])
    assert made.inputs["x"].data_ptr() == address
    copy = made.copies()["y"]
    made.outputs["y"].fill_(7)
    assert copy.item() == 0


def test_every_set_of_shapes_has_a_graph_until_there_are_too_many() -> None:
    buffers = BuffersByShape(Binder(), limit=2)
    found = [buffers.find({"x": torch.zeros(size)}, one_output) for size in (1, 2, 3) for _ in range(2)]
    assert [None if each is None else each.graph for each in found] == [None, 1, None, 2, None, None]
    assert len(buffers) == 2


def test_runs_of_the_same_shapes_use_the_same_addresses(graph: Path) -> None:
    engine = OrtCudaEngine(graph, device="cpu", cuda_graphs=True)
    plain = OrtEngine(graph)
    for seed in range(4):
        for batch in (1, 3):
            inputs = make_inputs(batch, seed=seed)
            torch.testing.assert_close(engine.run(inputs), plain.run(inputs))
    assert engine.captures
    engine.close()
    assert not engine.captures
    torch.testing.assert_close(engine.run(inputs), plain.run(inputs))


def test_nothing_is_captured_unless_asked_for(graph: Path) -> None:
    with OrtCudaEngine(graph, device="cpu") as engine:
        assert not engine.captures


def test_a_failed_capture_is_the_last(conditioning: Path) -> None:
    """The run in which it fails is repeated without; here that fails too, for its own reason."""
    engine = OrtCudaEngine(conditioning, device="cpu", cuda_graphs=True)
    good = {"timestep": torch.zeros(2), "class_labels": torch.tensor([1, CLASSES])}
    wrong = {"timestep": torch.zeros(2), "class_labels": torch.tensor([1, CLASSES + 1])}
    expected = engine.run(good)
    assert engine.captures
    with pytest.raises(EngineMismatchError, match="conditioning"):
        engine.run(wrong)
    assert not engine.captures
    torch.testing.assert_close(engine.run(good), expected)


def test_graphs_that_decide_sizes_on_the_device_are_not_captured(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    nodes = [helper.make_node("NonZero", ["x"], ["rows"]), helper.make_node("Size", ["rows"], ["y"])]
    shapes = [value("x", TensorProto.FLOAT, ["n"])], [value("y", TensorProto.INT64, [])]
    model = helper.make_model(
        helper.make_graph(nodes, "g", *shapes), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    onnx.save(model, tmp_path / "compact.onnx")
    assert not capturable(read_graph(tmp_path / "compact.onnx"))
    with OrtCudaEngine(tmp_path / "compact.onnx", device="cpu", cuda_graphs=True) as engine:
        assert not engine.captures
        for _ in range(3):
            assert engine.run({"x": torch.tensor([0.0, 1.0, 2.0])})["y"].item() == 2


def test_what_is_on_which_provider_is_asked_of_onnx_runtime(graph: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.parent))
    options.add_session_config_entry(RECORD_PROVIDERS, "1")
    session = onnxruntime.InferenceSession(graph.read_bytes(), options)
    assert all_nodes_on(session, "CPUExecutionProvider")
    assert not all_nodes_on(session, "CUDAExecutionProvider")


def test_options_reach_the_cuda_provider_alone() -> None:
    everything = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    providers = providers_for("cuda:1", everything, {"enable_cuda_graph": "1"})
    assert providers == [
        ("CUDAExecutionProvider", {"device_id": 1, "use_tf32": "0", "enable_cuda_graph": "1"}),
        "CPUExecutionProvider",
    ]
    assert providers_for("cpu", everything, {"enable_cuda_graph": "1"}) == ["CPUExecutionProvider"]


@pytest.mark.parametrize(("device", "kind"), [("cpu", OrtEngine), ("cuda", OrtCudaEngine), ("cuda:1", OrtCudaEngine)])
def test_the_engine_follows_from_the_device(device: str, kind: type) -> None:
    (engine,) = make_engines("onnx", [Path("absent.onnx")], EngineOptions(device=device))
    assert type(engine) is kind
