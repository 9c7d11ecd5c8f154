"""What TensorRT would refuse, found before it is asked: the same as the builder itself refuses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from dyexport.bundle.plan_info import Flavour
from dyexport.errors import EngineBuildError
from dyexport.exporters.onnx_graph import OPSET
from dyexport.exporters.operator_gate import MODULE, check_operators, find_unsupported
from dyexport.presets import get_preset
from dyexport.slicing.slicer import slice_segment
from dyexport.tensorrt_api import BuildLog, load_api
from tests.exporters.networks import half_width, slice_context, write_graph


def test_compact_tokens_are_refused_with_their_module(tmp_path: Path) -> None:
    preset = get_preset("sit-digits")
    graph = write_graph(slice_segment(slice_context(preset), half_width(preset, "compact")), tmp_path)
    with pytest.raises(
        EngineBuildError, match=r"refuses NonZero .* of module 'blocks\.0' \(3 more like it\).*--token-path dynamic"
    ):
        check_operators(onnx.load(graph, load_external_data=False), "tensorrt-rtx", largest_topk=0)
    assert not find_unsupported(onnx.load(graph, load_external_data=False), "tensorrt", largest_topk=0)


def model_of(
    node: onnx.NodeProto,
    *constants: onnx.TensorProto,
    inputs: Sequence[onnx.ValueInfoProto] = (),
    outputs: Sequence[onnx.ValueInfoProto] = (),
) -> onnx.ModelProto:
    node.metadata_props.add(key=MODULE, value="blocks.3")
    graph = helper.make_graph([node], "g", inputs, outputs, initializer=constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("op_type", ["ScatterElements", "ScatterND"])
def test_a_reducing_scatter_is_refused(op_type: str, flavour: Flavour) -> None:
    for reduction, refused in (("none", 0), ("add", 1)):
        node = helper.make_node(op_type, ["x", "i", "u"], ["y"], name="s", reduction=reduction)
        found = find_unsupported(model_of(node), flavour, largest_topk=0)
        assert len(found) == refused
    assert (found[0].module, found[0].cure) == ("blocks.3", "write rows back with a plain ScatterND")


FLOATS, ROWS, INDICES = [8, 4], [3, 4], {"ScatterND": [3, 1], "ScatterElements": [3, 4]}


def scatter(op_type: str, reduction: str) -> onnx.ModelProto:
    shapes = {"x": FLOATS, "i": INDICES[op_type], "u": ROWS}
    types = {"x": TensorProto.FLOAT, "i": TensorProto.INT64, "u": TensorProto.FLOAT}
    values = [helper.make_tensor_value_info(name, types[name], shape) for name, shape in shapes.items()]
    node = helper.make_node(op_type, list(shapes), ["y"], reduction=reduction)
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, FLOATS)
    return model_of(node, inputs=values, outputs=[out])


def non_zero() -> onnx.ModelProto:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, FLOATS)
    out = helper.make_tensor_value_info("y", TensorProto.INT64, [2, "kept"])
    return model_of(helper.make_node("NonZero", ["x"], ["y"]), inputs=[value], outputs=[out])


def top(count: int) -> onnx.ModelProto:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 5000])
    outs = [
        helper.make_tensor_value_info("v", TensorProto.FLOAT, [2, count]),
        helper.make_tensor_value_info("i", TensorProto.INT64, [2, count]),
    ]
    node = helper.make_node("TopK", ["x", "k"], ["v", "i"])
    return model_of(node, helper.make_tensor("k", TensorProto.INT64, [1], [count]), inputs=[value], outputs=outs)


def product(kind: int) -> onnx.ModelProto:
    value = helper.make_tensor_value_info("x", kind, [2, 16])
    out = helper.make_tensor_value_info("y", kind, [2, 16])
    weight = helper.make_tensor("w", kind, [16, 16], [0.5] * 256)
    return model_of(helper.make_node("Gemm", ["x", "w"], ["y"], transB=1), weight, inputs=[value], outputs=[out])


def takes(model: onnx.ModelProto, capability: str = "8.9") -> bool:
    """Whether TensorRT-RTX itself builds it, also for a GPU that ``Api.capability`` refuses."""
    api = load_api("tensorrt-rtx")
    log = BuildLog(api.trt)
    builder = api.trt.Builder(log.logger)
    network = builder.create_network(0)
    parser = api.trt.OnnxParser(network, log.logger)
    if not parser.parse(model.SerializeToString()):
        return False
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(api.trt.ComputeCapability, f"SM{capability.replace('.', '')}"), 0)
    return builder.build_serialized_network(network, config) is not None


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    "model",
    [
        *(scatter(op_type, reduction) for op_type in INDICES for reduction in ("none", "add")),
        non_zero(),
        top(3840),
        top(3841),
    ],
)
def test_the_gate_refuses_what_the_builder_refuses(rtx: Any, model: onnx.ModelProto) -> None:
    assert takes(model) == (not find_unsupported(model, "tensorrt-rtx", largest_topk=0))


@pytest.mark.tensorrt
@pytest.mark.parametrize("capability", ["7.5", "8.6"])
@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_products_in_fp32_are_refused_for_gpus_without_them(rtx: Any, kind: int, capability: str) -> None:
    model = product(kind)
    found = find_unsupported(model, "tensorrt-rtx", largest_topk=0, compute_capabilities=(capability, "12.0"))
    assert takes(model, capability) == (not found)
    assert not find_unsupported(model, "tensorrt-rtx", largest_topk=0)


@pytest.mark.parametrize(("count", "refused"), [(3840, False), (3841, True)])
def test_a_top_of_too_many_is_refused(count: int, refused: bool) -> None:
    node = helper.make_node("TopK", ["x", "k"], ["v", "i"])
    constant = model_of(node, helper.make_tensor("k", TensorProto.INT64, [1], [count]))
    assert bool(find_unsupported(constant, "tensorrt", largest_topk=0)) == refused
    assert bool(find_unsupported(model_of(node), "tensorrt", largest_topk=count)) == refused


def test_fp8_is_refused_for_gpus_without_it() -> None:
    zero = helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
    model = model_of(helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"]), zero)
    message = r"of module 'blocks\.3': .* from compute capability 8\.9 on; give .* or build with --quantize int8"
    with pytest.raises(EngineBuildError, match=message):
        check_operators(model, "tensorrt-rtx", largest_topk=0, compute_capabilities=("8.6", "12.0"))
    for capabilities in (("8.9", "12.0"), ()):
        assert not find_unsupported(model, "tensorrt-rtx", largest_topk=0, compute_capabilities=capabilities)


def test_too_many_tokens_are_refused_with_their_module_and_the_cure() -> None:
    node = helper.make_node("TopK", ["x", "k"], ["v", "i"], name="top")
    with pytest.raises(EngineBuildError, match=r"TopK 'top' of module 'blocks\.3': .*3840.*--token-path masked"):
        check_operators(model_of(node), "tensorrt-rtx", largest_topk=3841)
    check_operators(model_of(node), "tensorrt-rtx", largest_topk=3840)
