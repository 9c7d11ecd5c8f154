"""Attention as one operator: which nodes it replaces, and which it leaves as they are."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from dyexport.bundle.graph_forms import fuse_attention
from dyexport.bundle.onnx_schema import MESSAGES

HEADS, TOKENS, SIZE = 2, 5, 4


def graph(
    *,
    perm: tuple[int, ...] = (0, 1, 3, 2),
    axis: int = -1,
    masked: bool = False,
    blocks: int = 1,
    outputs: tuple[str, ...] = (),
) -> onnx.ModelProto:
    """Attention of x with itself, ``blocks`` times, written as the exporter does."""
    nodes, x = [], "x"
    for b in range(blocks):
        nodes += [
            helper.make_node("Transpose", [x], [f"key{b}"], perm=list(perm)),
            helper.make_node("MatMul", [x, f"key{b}"], [f"scores{b}"]),
        ]
        scores = f"scores{b}"
        if masked:
            nodes.append(helper.make_node("Add", [scores, "mask"], [f"masked{b}"]))
            scores = f"masked{b}"
        last = helper.make_node("MatMul", [f"weights{b}", x], [f"y{b}"], name=f"attention_{b}")
        last.metadata_props.add(key="module", value=f"blocks.{b}")
        nodes += [helper.make_node("Softmax", [scores], [f"weights{b}"], axis=axis), last]
        x = f"y{b}"
    value = helper.make_tensor_value_info
    inputs = [value("x", TensorProto.FLOAT, ["batch", HEADS, TOKENS, SIZE])]
    if masked:
        inputs.append(value("mask", TensorProto.FLOAT, ["batch", 1, 1, TOKENS]))
    made = [value(name, TensorProto.FLOAT, ["b", "h", "n", "m"]) for name in (x, *outputs)]
    return helper.make_model(
        helper.make_graph(nodes, "g", inputs, made), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )


def fused(model: onnx.ModelProto) -> tuple[int, onnx.ModelProto]:
    message = MESSAGES["ModelProto"].FromString(model.SerializeToString())
    count = fuse_attention(message)
    return count, onnx.ModelProto.FromString(message.SerializeToString())


def run(model: onnx.ModelProto) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    feed = {"x": rng.standard_normal((3, HEADS, TOKENS, SIZE)).astype(np.float32)}
    if len(model.graph.input) > 1:
        feed["mask"] = np.where(rng.random((3, 1, 1, TOKENS)) < 0.4, -1e4, 0.0).astype(np.float32)
    return ort.InferenceSession(model.SerializeToString()).run(None, feed)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("blocks", [1, 3])
def test_attention_becomes_one_operator(masked: bool, blocks: int) -> None:
    model = graph(masked=masked, blocks=blocks)
    count, changed = fused(model)
    onnx.checker.check_model(changed, full_check=True)
    kinds = [node.op_type for node in changed.graph.node]
    assert (count, kinds.count("Attention"), kinds.count("Expand")) == (blocks, blocks, int(masked))
    assert not {"Softmax", "MatMul", "Transpose", "Add"} & set(kinds)
    attention = [node for node in changed.graph.node if node.op_type == "Attention"]
    assert [node.name for node in attention] == [f"attention_{b}" for b in range(blocks)]
    assert [node.metadata_props[0].value for node in attention] == [f"blocks.{b}" for b in range(blocks)]
    assert changed.opset_import[0].version == 23
    np.testing.assert_allclose(run(changed)[0], run(model)[0], atol=1e-6)


@pytest.mark.parametrize(
    "model",
    [
        graph(axis=2),
        graph(perm=(0, 1, 2, 3)),
        graph(outputs=("scores0",)),
        graph(outputs=("weights0",)),
        graph(masked=True, outputs=("scores0",)),
    ],
    ids=["axis", "perm", "scores are read", "weights are read", "scores below a mask are read"],
)
def test_other_graphs_are_left_as_they_are(model: onnx.ModelProto) -> None:
    assert fused(model) == (0, model)


def test_a_transposed_key_with_another_reader_stays() -> None:
    model = graph(outputs=("key0",))
    count, changed = fused(model)
    assert count == 1
    for now, before in zip(run(changed), run(model), strict=True):
        np.testing.assert_allclose(now, before, atol=1e-6)
