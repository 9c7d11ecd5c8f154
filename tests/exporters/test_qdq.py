"""Q/DQ nodes around every linear layer of attention and MLP, in the form that TensorRT fuses, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto

from dyexport.bundle.spec import Quantization
from dyexport.errors import ExportError
from dyexport.exporters.onnx_graph import MODULE, STORE, check_onnx, export_onnx
from dyexport.exporters.weight_store import write_store
from dyexport.models.random_weights import random_dynamic
from dyexport.slicing.quantizing import linear_inputs
from dyexport.slicing.slicer import Slice, dense_reader, spec_of
from dyexport.slicing.store_layout import lay_out
from tests.slicing.test_quantizing import PRESETS, first_units

CODES = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}


def with_ranges(piece: Slice) -> Slice:
    return replace(piece, ranges=dict.fromkeys(linear_inputs(piece), 4.0))


def exported(backbone: str, quantization: Quantization, directory: Path) -> onnx.GraphProto:
    preset = PRESETS[backbone]
    piece = with_ranges(first_units(backbone, 2, quantization))
    layout = lay_out(piece.recipes.values())
    spec = spec_of(preset, preset.transformer_config())
    write_store(layout, dense_reader(random_dynamic(preset).all_weights(), spec), directory / STORE)
    export_onnx(piece, layout, directory / "network.onnx")
    check_onnx(directory / "network.onnx")
    return onnx.load(directory / "network.onnx", load_external_data=False).graph


@pytest.mark.parametrize(("backbone", "quantization"), [("sit", "int8"), ("flux", "fp8"), ("latte", "int8")])
def test_every_linear_layer_reads_codes(backbone: str, quantization: Quantization, tmp_path: Path) -> None:
    graph = exported(backbone, quantization, tmp_path)
    made_by = {output: node for node in graph.node for output in node.output}
    stored = {tensor.name: tensor for tensor in graph.initializer}
    linears = linear_inputs(first_units(backbone, 2, None))
    found = set()
    for gemm in (node for node in graph.node if node.op_type == "Gemm"):
        weight = made_by.get(gemm.input[1])
        if weight is None:
            assert gemm.input[1] not in linears
            continue
        assert len(gemm.input) == 2, "the bias is added after"
        quantized = made_by[gemm.input[0]]
        assert (weight.op_type, quantized.op_type) == ("DequantizeLinear", "DequantizeLinear")
        assert made_by[quantized.input[0]].op_type == "QuantizeLinear"
        assert stored[weight.input[0]].data_type == stored[quantized.input[2]].data_type == CODES[quantization]
        assert {entry.value for entry in stored[weight.input[1]].external_data} >= {STORE}
        assert weight.metadata_props == quantized.metadata_props == gemm.metadata_props
        assert [entry.key for entry in gemm.metadata_props] == [MODULE]
        found.add(weight.input[0])
    assert found == set(linears)
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == len(linears)


def test_a_missing_range_is_named(tmp_path: Path) -> None:
    piece = with_ranges(first_units("sit", 2, "int8"))
    ranges = {name: largest for name, largest in piece.ranges.items() if name != "blocks.1.fc2.weight"}
    with pytest.raises(ExportError, match=r"no range for what is multiplied with 'blocks\.1\.fc2\.weight'"):
        export_onnx(replace(piece, ranges=ranges), lay_out(piece.recipes.values()), tmp_path / "network.onnx")
