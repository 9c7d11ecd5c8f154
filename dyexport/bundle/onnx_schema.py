"""The part of ONNX's file format that running and compiling a bundle need, so that they need no ``onnx`` package.

Messages are protobuf classes with the field names and numbers of ``onnx.proto``. Fields that are not listed here stay
in a message as they were read, and are written again with it.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

from dyexport.bundle.tensors import TensorSpec

Message: TypeAlias = Any
"""A message of ``MESSAGES``; protobuf makes their classes at run time."""

# By message: fields with their number and type; a type in brackets is of a repeated field.
FIELDS: dict[str, dict[str, tuple[int, str]]] = {
    "ModelProto": {
        "graph": (7, "GraphProto"),
        "opset_import": (8, "[OperatorSetIdProto]"),
        "metadata_props": (14, "[Entry]"),
        "functions": (25, "[FunctionProto]"),
    },
    "OperatorSetIdProto": {"domain": (1, "string"), "version": (2, "int64")},
    "FunctionProto": {"node": (7, "[NodeProto]")},
    "GraphProto": {
        "node": (1, "[NodeProto]"),
        "initializer": (5, "[TensorProto]"),
        "input": (11, "[ValueInfoProto]"),
        "output": (12, "[ValueInfoProto]"),
        "sparse_initializer": (15, "[SparseTensorProto]"),
    },
    "NodeProto": {
        "input": (1, "[string]"),
        "output": (2, "[string]"),
        "name": (3, "string"),
        "op_type": (4, "string"),
        "attribute": (5, "[AttributeProto]"),
        "domain": (7, "string"),
        "metadata_props": (9, "[Entry]"),
    },
    "AttributeProto": {
        "name": (1, "string"),
        "f": (2, "float"),
        "i": (3, "int64"),
        "s": (4, "bytes"),
        "t": (5, "TensorProto"),
        "g": (6, "GraphProto"),
        "ints": (8, "[int64]"),
        "tensors": (10, "[TensorProto]"),
        "graphs": (11, "[GraphProto]"),
        "type": (20, "int32"),
        "sparse_tensor": (22, "SparseTensorProto"),
        "sparse_tensors": (23, "[SparseTensorProto]"),
    },
    "TensorProto": {
        "dims": (1, "[int64]"),
        "data_type": (2, "int32"),
        "int64_data": (7, "[int64]"),
        "name": (8, "string"),
        "raw_data": (9, "bytes"),
        "external_data": (13, "[Entry]"),
    },
    "SparseTensorProto": {"values": (1, "TensorProto"), "indices": (2, "TensorProto")},
    "ValueInfoProto": {"name": (1, "string"), "type": (2, "TypeProto")},
    "TypeProto": {"tensor_type": (1, "Tensor")},
    "Tensor": {"elem_type": (1, "int32"), "shape": (2, "TensorShapeProto")},
    "TensorShapeProto": {"dim": (1, "[Dimension]")},
    "Dimension": {"dim_value": (1, "int64"), "dim_param": (2, "string")},
    "Entry": {"key": (1, "string"), "value": (2, "string")},
}
SCALARS = {
    "bytes": FieldDescriptorProto.TYPE_BYTES,
    "float": FieldDescriptorProto.TYPE_FLOAT,
    "int32": FieldDescriptorProto.TYPE_INT32,
    "int64": FieldDescriptorProto.TYPE_INT64,
    "string": FieldDescriptorProto.TYPE_STRING,
}
DTYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
    14: "complex64",
    15: "complex128",
    16: "bfloat16",
    17: "float8_e4m3fn",
    18: "float8_e4m3fnuz",
    19: "float8_e5m2",
    20: "float8_e5m2fnuz",
}
"""Names that torch and numpy share, by ``TensorProto.DataType``."""
FLOAT32 = 1
INT64 = 7
BFLOAT16 = 16
FLOAT8E4M3FN = 17


def _message_classes() -> dict[str, Any]:
    # syntax 2, as onnx.proto: text that is not UTF-8 is then read as bytes instead of being refused
    file = FileDescriptorProto(name="onnx.proto", package="onnx", syntax="proto2")
    for message, fields in FIELDS.items():
        described = file.message_type.add(name=message)
        for name, (number, kind) in fields.items():
            repeated = kind.startswith("[")
            field = described.field.add(name=name, number=number)
            field.label = FieldDescriptorProto.LABEL_REPEATED if repeated else FieldDescriptorProto.LABEL_OPTIONAL
            if (inner := kind.strip("[]")) in SCALARS:
                field.type = SCALARS[inner]
            else:
                field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, f".onnx.{inner}"
    pool = DescriptorPool()
    pool.Add(file)
    return {name: GetMessageClass(pool.FindMessageTypeByName(f"onnx.{name}")) for name in FIELDS}


MESSAGES = _message_classes()


def tensor_spec(value: Message) -> TensorSpec:
    """Describe a ``ValueInfoProto``, of this schema or of ``onnx``; a size without a name gets one.

    Raises ``KeyError`` for an element type that no tensor of torch has.
    """
    tensor = value.type.tensor_type
    dims = enumerate(tensor.shape.dim)
    shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or f"{value.name}_{axis}" for axis, d in dims)
    return TensorSpec(name=value.name, dtype=DTYPES[tensor.elem_type], shape=shape)
