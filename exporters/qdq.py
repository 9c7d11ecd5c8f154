"""Insert explicit Q/DQ nodes, in the form that both TensorRT and ONNX Runtime fuse with a matrix product.

    x -> QuantizeLinear -> DequantizeLinear -> Gemm -> Add <- bias
         codes in the weight store -> DequantizeLinear ^

Scales have the dtype of the product, as strongly typed networks require. ONNX Runtime fuses a ``QGemm`` only if there
is no float bias and there are zero points; all zero points are 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch

from dyexport.bundle.spec import Quantization
from dyexport.errors import ExportError
from dyexport.slicing.quantizing import SCALE
from dyexport.slicing.recipes import Recipe, scale_of
from dyexport.slicing.slicer import Slice

CODES: Mapping[Quantization, ir.DataType] = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}


def insert_qdq(model: ir.Model, slice_: Slice) -> None:
    """Replace the float weight of every quantized ``Gemm`` by codes, and quantize its input.

    Raises ``ExportError`` for a weight that anything else than one ``Gemm`` reads, or whose input has no range.
    """
    for name, recipe in slice_.recipes.items():
        if recipe.quantization is not None and not recipe.scales:
            gemm = _gemm_with(model.graph, name)
            _quantize_input(gemm, _input_scale(slice_, name, recipe), CODES[recipe.quantization])
            _dequantize_weight(gemm, CODES[recipe.quantization], axis=1 if recipe.kind == "columns" else 0)
            _take_out_bias(gemm)


def _gemm_with(graph: ir.Graph, weight: str) -> ir.Node:
    uses = tuple(graph.initializers[weight].uses()) if weight in graph.initializers else ()
    if [(use.node.op_type, use.idx) for use in uses] != [("Gemm", 1)]:
        raise ExportError(f"{weight!r} is quantized, so one Gemm must read it and nothing else")
    return uses[0].node


def _input_scale(slice_: Slice, weight: str, recipe: Recipe) -> float:
    assert recipe.quantization is not None
    largest = slice_.ranges.get(weight, 0.0)
    if not largest > 0:
        raise ExportError(f"calibration has no range for what is multiplied with {weight!r}")
    return float(scale_of(torch.tensor(largest), recipe.quantization, recipe.dtype))


def _quantize_input(gemm: ir.Node, scale: float, codes: ir.DataType) -> None:
    value, weight = _input(gemm, 0), _input(gemm, 1)
    floats = _type_of(weight)
    stored = _constant(gemm, f"{weight.name}_input_scale", scale, floats)
    zero = _constant(gemm, f"{weight.name}_input_zero_point", 0, codes)
    quantized = _insert(gemm, "QuantizeLinear", (value, stored, zero), codes)
    gemm.replace_input_with(0, _insert(gemm, "DequantizeLinear", (quantized, stored, zero), floats))


def _dequantize_weight(gemm: ir.Node, codes: ir.DataType, *, axis: int) -> None:
    """Read the weight as codes of the same name, with a new initializer for the scales of outputs along ``axis``."""
    weight = _input(gemm, 1)
    floats, name = _type_of(weight), SCALE.format(weight=weight.name)
    assert weight.shape is not None
    outputs = weight.shape[axis]
    assert isinstance(outputs, int)
    scales = ir.Value(name=name, type=ir.TensorType(floats), shape=ir.Shape([outputs]))
    _graph_of(gemm).initializers.add(scales)
    zeros = _constant(gemm, f"{weight.name}_zero_point", [0] * outputs, codes)
    weight.dtype = codes
    gemm.replace_input_with(1, _insert(gemm, "DequantizeLinear", (weight, scales, zeros), floats, axis=axis))


def _take_out_bias(gemm: ir.Node) -> None:
    if len(gemm.inputs) < 3:
        return
    product, bias = gemm.outputs[0], _input(gemm, 2)
    gemm.resize_inputs(2)
    add = ir.node("Add", (product, bias))
    add.metadata_props.update(gemm.metadata_props)
    add.outputs[0].type, add.outputs[0].shape = product.type, product.shape
    ir.convenience.replace_all_uses_with(product, add.outputs[0], replace_graph_outputs=True)
    add.replace_input_with(0, product)
    _graph_of(gemm).insert_after(gemm, add)


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _type_of(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None
    return value.dtype


def _graph_of(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def _constant(gemm: ir.Node, name: str, value: float | list[int], dtype: ir.DataType) -> ir.Value:
    """Add a constant for one node only: ONNX Runtime would make two copies of a shared one, of the same name."""
    tensor = ir.Tensor(np.array(value, dtype.numpy()), dtype=dtype, name=name)
    constant = ir.Value(name=name, type=ir.TensorType(dtype), shape=tensor.shape, const_value=tensor)
    _graph_of(gemm).initializers.add(constant)
    return constant


def _insert(
    gemm: ir.Node, op_type: str, inputs: Sequence[ir.Value], dtype: ir.DataType, axis: int | None = None
) -> ir.Value:
    """Insert a node before the product, in the same module. Its output has the shape of its first input."""
    node = ir.node(op_type, inputs, {} if axis is None else {"axis": axis})
    node.metadata_props.update(gemm.metadata_props)
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), inputs[0].shape
    _graph_of(gemm).insert_before(gemm, node)
    return node.outputs[0]
