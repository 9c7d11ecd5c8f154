"""Graphs are translated with copies of one registry of operators."""

from __future__ import annotations

import torch
from onnxscript import opset20 as op
from torch.onnx._internal.exporter._registration import ONNXRegistry

from dyexport.exporters.operators import copied_registry, operators_read_once

GELU = torch.ops.aten.gelu.default


def translated(value: object) -> object:
    return op.Identity(value)


def test_a_copy_has_every_operator_and_keeps_what_is_added_to_itself() -> None:
    copy = copied_registry(20)
    expected = ONNXRegistry.from_torchlib(20)
    assert copy.opset_version == expected.opset_version
    assert {name: [d.onnx_function for d in known] for name, known in copy.functions.items()} == {
        name: [d.onnx_function for d in known] for name, known in expected.functions.items()
    }
    copy.register_op(GELU, translated)
    assert [d.is_custom for d in copied_registry(20).get_decomps(GELU)] == [False]


def test_torch_reads_them_itself_outside_the_context() -> None:
    before = ONNXRegistry.from_torchlib
    with operators_read_once():
        assert ONNXRegistry.from_torchlib is copied_registry
    assert ONNXRegistry.from_torchlib == before
