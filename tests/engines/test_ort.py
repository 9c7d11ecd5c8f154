"""What is ONNX Runtime's alone: errors, weights in place, devices."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from dyexport.bundle.graph_forms import AttentionForm
from dyexport.bundle.onnx_schema import MESSAGES
from dyexport.engines import ort as ort_engine
from dyexport.engines.ort import OrtEngine, check_provider, providers_for, suitable_attention, vendor_errors
from dyexport.errors import EngineBuildError, EngineMismatchError, MissingDependencyError
from tests.engines.tiny import (
    CLASSES,
    Store,
    make_inputs,
    make_weights,
    whole_segment,
    write_conditioning_onnx,
    write_onnx,
)

SEGMENT = whole_segment(gated=False)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "segment-00.onnx"
    write_onnx(path, make_weights(), SEGMENT, Store(tmp_path / "weights.bin"))
    return path


def edit(path: Path, change: object) -> None:
    model = onnx.load(path, load_external_data=False)
    change(model)  # type: ignore[operator]
    path.write_bytes(model.SerializeToString())


def relocate(model: onnx.ModelProto, location: str) -> None:
    external = (tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in next(external).external_data if entry.key == "location").value = location


def test_missing_file_is_a_build_error(tmp_path: Path) -> None:
    with pytest.raises(EngineBuildError, match=r"absent\.onnx"):
        _ = OrtEngine(tmp_path / "absent.onnx").io


def test_garbage_is_a_build_error(tmp_path: Path) -> None:
    path = tmp_path / "garbage.onnx"
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(EngineBuildError, match=r"garbage\.onnx"):
        OrtEngine(path).activate()


@pytest.mark.parametrize("kind", [0, 99])
def test_unknown_types_are_a_build_error(graph: Path, kind: int) -> None:
    edit(graph, lambda model: setattr(model.graph.input[0].type.tensor_type, "elem_type", kind))
    with pytest.raises(EngineBuildError, match="not tensors"):
        _ = OrtEngine(graph).io


def test_an_error_without_a_message_goes_by_its_name() -> None:
    with (
        pytest.raises(EngineBuildError, match="cannot load: RuntimeError"),
        vendor_errors(EngineBuildError, "cannot load"),
    ):
        raise RuntimeError
    with pytest.raises(EngineBuildError, match="cannot load: why"), vendor_errors(EngineBuildError, "cannot load"):
        raise ValueError("\n\n why \n  else")


def test_unknown_operator_is_a_build_error(graph: Path) -> None:
    edit(graph, lambda model: setattr(model.graph.node[0], "op_type", "Flutter"))
    with pytest.raises(EngineBuildError, match="Flutter"):
        OrtEngine(graph).activate()


def test_a_provider_that_fails_is_not_replaced_by_the_cpu(
    graph: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime would print that it falls back, to the standard output."""
    monkeypatch.setattr(ort_engine, "providers_for", lambda *arguments: [("CPUExecutionProvider", "no options")])
    with pytest.raises(EngineBuildError, match="'providers' values must be"):
        OrtEngine(graph).activate()
    assert capsys.readouterr().out == ""


def test_a_session_without_its_provider_is_refused(graph: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.parent))
    session = onnxruntime.InferenceSession(graph.read_bytes(), options, providers=["CPUExecutionProvider"])
    check_provider(session, "cpu")
    with pytest.raises(EngineMismatchError, match="cannot start its CUDA provider"):
        check_provider(session, "cuda:0")


def test_missing_weights_are_a_build_error(graph: Path) -> None:
    (graph.parent / "weights.bin").unlink()
    engine = OrtEngine(graph)
    assert engine.weights, "the graph can still be read"
    with pytest.raises(EngineBuildError, match="segment-00"):
        engine.activate()


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/passwd", "a/../../weights.bin"])
def test_weights_outside_the_folder_are_refused(graph: Path, location: str) -> None:
    edit(graph, lambda model: relocate(model, location))
    with pytest.raises(EngineBuildError, match="outside the bundle"):
        OrtEngine(graph).activate()


def test_undetermined_outputs_are_refused(graph: Path) -> None:
    edit(graph, lambda model: setattr(model.graph.output[0].type.tensor_type.shape.dim[0], "dim_param", "other"))
    with pytest.raises(EngineMismatchError, match="sample"):
        OrtEngine(graph).run(make_inputs(2))


def test_label_out_of_range_is_a_mismatch(tmp_path: Path) -> None:
    path = tmp_path / "conditioning.onnx"
    write_conditioning_onnx(path, make_weights(), Store(tmp_path / "weights.bin"))
    engine = OrtEngine(path)
    with pytest.raises(EngineMismatchError, match="conditioning"):
        engine.run({"timestep": torch.zeros(2), "class_labels": torch.tensor([1, CLASSES + 1])})
    assert engine.run({"timestep": torch.zeros(2), "class_labels": torch.tensor([1, CLASSES])})


def test_weight_spans_cover_what_the_graph_reads(graph: Path) -> None:
    spans = OrtEngine(graph).weights
    assert sum(span.length for span in spans) == (graph.parent / "weights.bin").stat().st_size


SHARED = """
import sys
import numpy as np, onnx
from onnx import TensorProto, helper
from pathlib import Path
from dyexport.engines.ort import OrtEngine
from tests.engines.tiny import Store

import torch
torch.set_num_threads(1)
size, folder = 2048, Path(sys.argv[1])
store = Store(folder / "weights.bin")
store.add(np.ones((size, size), np.float32))

def pss():
    rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in rollup if line.startswith("Pss:")) * 1024

def engine(rows):
    tensor = TensorProto(name="w", data_type=1, dims=[rows, size], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "weights.bin", "offset": 0, "length": rows * size * 4}.items():
        tensor.external_data.add(key=key, value=str(value))
    value = helper.make_tensor_value_info
    graph = helper.make_graph([helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)], "g",
                              [value("x", 1, ["b", size])], [value("y", 1, ["b", rows])], [tensor])
    path = folder / f"{rows}.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return OrtEngine(path, share_weights=sys.argv[2] == "shared")

engines = [engine(rows) for rows in (2048, 2047, 2046, 2045)]
x = {"x": torch.ones(1, size)}
engine(1).run(x)
before = pss()
for each in engines:
    each.run(x)
print((pss() - before) / (size * size * 4))
"""


@pytest.mark.build
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the system does not tell resident bytes")
def test_sessions_over_one_file_hold_its_weights_once(tmp_path: Path) -> None:
    def copies(mode: str) -> float:
        folder = tmp_path / mode
        folder.mkdir()
        command = [sys.executable, "-c", SHARED, str(folder), mode]
        return float(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)

    assert copies("shared") < 1.5
    assert copies("copied") > 3.5


def test_providers() -> None:
    everything = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert providers_for("cpu", everything) == ["CPUExecutionProvider"]
    assert providers_for("cuda:1", everything)[0] == ("CUDAExecutionProvider", {"device_id": 1, "use_tf32": "0"})
    with pytest.raises(MissingDependencyError, match="gpu"):
        providers_for("cuda", ["CPUExecutionProvider"])
    with pytest.raises(EngineMismatchError, match="tpu"):
        providers_for("tpu", everything)


@pytest.mark.parametrize(("form", "count"), [("fused", 1), ("primitive", 0), (None, 0)])
def test_the_form_that_is_asked_for_runs(
    form: AttentionForm | None, count: int, graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused: list[object] = []
    monkeypatch.setattr(ort_engine, "fuse_attention", fused.append)
    OrtEngine(graph, attention=form).activate()
    assert len(fused) == count


@pytest.mark.parametrize(
    ("device", "version", "operators", "form"),
    [
        ("cpu", "1.32.0", ["Softmax"], "primitive"),
        ("cuda", "1.26.1", ["Softmax"], "primitive"),
        ("cuda", "1.27.0", ["Softmax"], "fused"),
        ("cuda", "2.0.0", ["Softmax"], "fused"),
        ("cuda", "1.32.0", ["QuantizeLinear", "Softmax"], "primitive"),
    ],
)
def test_the_form_of_attention_follows_from_the_device(
    device: str, version: str, operators: list[str], form: str
) -> None:
    model = MESSAGES["ModelProto"]()
    for name in operators:
        model.graph.node.add(op_type=name)
    assert suitable_attention(model, device, version) == form


def test_inputs_on_another_device_are_refused(graph: Path) -> None:
    inputs = {name: tensor.to("meta") for name, tensor in make_inputs(2).items()}
    with pytest.raises(EngineMismatchError, match="is on meta, the engine on cpu"):
        OrtEngine(graph).run(inputs)


def test_missing_library_names_the_extra(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    ort_engine.load_onnxruntime.cache_clear()
    engine = OrtEngine(graph)
    assert engine.io.inputs, "bindings need no onnxruntime"
    with pytest.raises(MissingDependencyError, match=r"dyexport\[cpu\]"):
        engine.activate()
    ort_engine.load_onnxruntime.cache_clear()


@pytest.mark.gpu
def test_cuda_runs_in_place(graph: Path) -> None:
    inputs = make_inputs(3)
    with OrtEngine(graph, device="cuda") as engine:
        outputs = engine.run({name: tensor.cuda() for name, tensor in inputs.items()})
    assert outputs["sample"].device.type == "cuda"
    torch.testing.assert_close(outputs["sample"].cpu(), OrtEngine(graph).run(inputs)["sample"], atol=1e-4, rtol=0)
