"""The schema is a part of ONNX's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto

from dyexport.bundle.onnx_schema import BFLOAT16, DTYPES, MESSAGES, tensor_spec

NESTED = {
    "Entry": onnx.StringStringEntryProto,
    "Tensor": onnx.TypeProto.Tensor,
    "Dimension": onnx.TensorShapeProto.Dimension,
}


def fields_of(message: Any) -> dict[str, FieldDescriptorProto]:
    described = DescriptorProto()
    message.DESCRIPTOR.CopyToProto(described)
    return {field.name: field for field in described.field}


def original(name: str) -> Any:
    return NESTED.get(name) or getattr(onnx, name)


@pytest.mark.parametrize("name", MESSAGES)
def test_fields_are_onnx_fields(name: str) -> None:
    known = fields_of(original(name))
    for field in fields_of(MESSAGES[name]).values():
        same = known[field.name]
        wire = same.type if same.type != FieldDescriptorProto.TYPE_ENUM else FieldDescriptorProto.TYPE_INT32
        assert (field.number, field.type, field.label) == (same.number, wire, same.label)
        if field.type_name:
            inner = field.type_name.rpartition(".")[2]
            assert same.type_name == f".{original(inner).DESCRIPTOR.full_name}"


def test_dtypes_are_onnx_types() -> None:
    for number, name in DTYPES.items():
        assert str(onnx.helper.tensor_dtype_to_np_dtype(number)) == name
    assert onnx.TensorProto.BFLOAT16 == BFLOAT16


def test_what_the_schema_does_not_list_is_kept() -> None:
    weight = onnx.numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(2, 3), "weight")
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Gemm", ["x", "weight"], ["y"], name="gemm", transB=0, doc_string="kept")
    shapes = [value("x", onnx.TensorProto.FLOAT, ["batch", 2])], [value("y", onnx.TensorProto.FLOAT, [None, 3])]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "graph", *shapes, [weight]), producer_name="test")
    read = MESSAGES["ModelProto"].FromString(model.SerializeToString())
    assert onnx.ModelProto.FromString(read.SerializeToString()) == model
    assert tensor_spec(read.graph.input[0]).shape == ("batch", 2)
    assert tensor_spec(read.graph.output[0]).shape == ("y_0", 3)
