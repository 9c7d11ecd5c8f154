"""``verify --layers`` names the layer that is wrong, be it a weight or a node."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from dyexport.bundle.graph_labels import MODULE
from dyexport.bundle.manifest import DENSE, DENSE_CONDITIONING
from dyexport.bundle.plan import segment_name
from dyexport.bundle.reader import Bundle
from dyexport.cli import main
from dyexport.pipeline.networks import cut_networks
from dyexport.slicing.recipes import Recipe
from dyexport.slicing.slicer import SliceContext
from dyexport.verification.activations import match_activations
from dyexport.verification.layers import LayerErrors
from dyexport.verification.report import VerifyReport
from dyexport.verification.settings import VerifySettings
from dyexport.verification.verify import verify_bundle
from tests.pipeline.tiny import tamper
from tests.verification.test_verify import overwrite

SETTINGS = VerifySettings(timesteps=1, layers=True)


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Bundle:
    """A bundle to tamper with, next to the reference."""
    shutil.copytree(bundle.root.parent, tmp_path / "copy")
    return Bundle.open(tmp_path / "copy" / bundle.root.name)


def layers_with_weights(bundle: Bundle) -> set[tuple[str, str]]:
    """Network and module of every Linear, embedding and convolution."""
    manifest = bundle.manifest
    context = SliceContext.of(manifest.model, bundle.widths, bundle.token_stats)
    networks = cut_networks(context, bundle.widths, manifest.plan.segments, baseline=False, own_dense="nothing")
    return {
        (network.name, name.rpartition(".")[0])
        for network in networks
        for name in network.slice.recipes
        if name.endswith(".weight")
    }


def first_drift(report: VerifyReport) -> LayerErrors:
    assert not report.passed
    assert report.layers is not None
    assert report.layers.first_drift is not None
    return report.layers.first_drift


def assert_every_layer_agrees(bundle: Bundle) -> None:
    report = verify_bundle(bundle.root, SETTINGS)
    assert report.passed
    assert report.layers is not None
    assert report.layers.first_drift is None
    compared = {(layer.network, layer.module) for layer in report.layers.layers}
    assert compared >= layers_with_weights(bundle)
    networks = set(bundle.engine_paths("onnx")) - {DENSE, DENSE_CONDITIONING}  # the dense network has no masked model
    assert compared >= {(name, name) for name in networks}, "what the network itself makes"
    worst = max(layer.relative_error for layer in report.layers.layers if layer.relative_error is not None)
    assert 0 < worst < 1e-5


def test_every_layer_of_a_bundle_agrees(bundle: Bundle) -> None:
    assert_every_layer_agrees(bundle)


def shift_row(recipe: Recipe, values: np.ndarray) -> None:
    values[0] += 0.1 * np.abs(values).max()


@pytest.mark.parametrize("bundle", ["compact", "dynamic"], indirect=True)
@pytest.mark.parametrize(
    ("network", "weight"),
    [
        ("conditioning", "time_out.weight"),
        ("segment-00", "patch.bias"),
        ("segment-00", "blocks.0.qkv.weight"),
        ("segment-00", "blocks.0.router_out.bias"),
        ("segment-00", "blocks.1.fc2.weight"),
        ("segment-00", "final.bias"),
    ],
)
def test_a_wrong_weight_is_found_in_its_layer(copy: Bundle, network: str, weight: str) -> None:
    overwrite(copy, network, weight, shift_row)
    found = first_drift(verify_bundle(copy.root, SETTINGS))
    assert (found.network, found.module) == (network, weight.rpartition(".")[0])
    assert found.relative_error is not None
    assert found.relative_error > 1e-4


def change_node(bundle: Bundle, op_type: str, change: Callable[[onnx.NodeProto], None]) -> None:
    """Edit the node of a kind that the last segment's second block has, as a broken exporter would write it."""
    name = f"graphs/{segment_name(len(bundle.manifest.plan.segments) - 1)}.onnx"
    model = onnx.load(bundle.root / name, load_external_data=False)
    scope = {MODULE: "blocks.1"}
    nodes = [node for node in model.graph.node if scope == {entry.key: entry.value for entry in node.metadata_props}]
    change(next(node for node in nodes if node.op_type == op_type))
    tamper(bundle.root, name, lambda content: model.SerializeToString())


@pytest.mark.parametrize("bundle", ["compact", "dynamic"], indirect=True)
@pytest.mark.parametrize(
    ("op_type", "attribute", "value"),
    [("Softmax", "axis", 2), ("Gelu", "approximate", b"none")],
)
def test_a_wrong_node_is_found_in_its_block(copy: Bundle, op_type: str, attribute: str, value: object) -> None:
    def change(node: onnx.NodeProto) -> None:
        kept = [each for each in node.attribute if each.name != attribute]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(attribute, value)])

    change_node(copy, op_type, change)
    found = first_drift(verify_bundle(copy.root, replace(SETTINGS, tolerance=1e-5)))
    assert (found.network, found.module) == (segment_name(len(copy.manifest.plan.segments) - 1), "blocks.1")


class Best(nn.Module):
    """A network that picks rows by their scores, in no order that anyone agreed on."""

    def __init__(self) -> None:
        super().__init__()
        self.pick = Pick()

    def forward(self, scores: Tensor) -> Tensor:
        return self.pick(scores) * 2


class Pick(nn.Module):
    def forward(self, scores: Tensor) -> Tensor:
        return scores.topk(3, dim=1, sorted=False).indices.float()  # (B, 3)


@pytest.mark.parametrize("largest", [1, 0])
def test_what_is_sorted_is_compared_as_a_set(tmp_path: Path, largest: int) -> None:
    """Rows in the order of the graph, which is not torch's, are the same rows; other rows are not."""
    nodes = [
        onnx.helper.make_node("TopK", ["scores", "k"], ["v", "i"], largest=largest, sorted=1),
        onnx.helper.make_node("Cast", ["i"], ["f"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("Mul", ["f", "two"], ["out"]),
    ]
    for node in nodes[:2]:
        node.metadata_props.add(key=MODULE, value="pick")
    constants = [
        onnx.helper.make_tensor("k", onnx.TensorProto.INT64, [1], [3]),
        onnx.helper.make_tensor("two", onnx.TensorProto.FLOAT, [], [2.0]),
    ]
    scores = onnx.helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, [2, 8])
    out = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [2, 3])
    graph = onnx.helper.make_graph(nodes, "g", [scores], [out], initializer=constants)
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10),
        tmp_path / "g.onnx",
    )
    feed = {"scores": torch.randn(2, 8, generator=torch.Generator().manual_seed(0))}
    pairs = match_activations(tmp_path / "g.onnx", Best(), feed).pairs
    assert [pair.module for pair in pairs] == ["pick", "pick", ""]
    equal = [np.array_equal(pair.onnx, pair.torch) for pair in pairs]
    assert equal == [largest == 1, True, True], "the scores tell; rows are given to torch"


@pytest.mark.parametrize("bundle", ["compact"], indirect=True)
def test_polygraphy_reads_every_graph(bundle: Bundle) -> None:
    """What its tools start with: loading with weights, and a type and a shape for every value."""
    from polygraphy.backend.onnx import infer_shapes, onnx_from_path

    for path in bundle.engine_paths("onnx").values():
        model = infer_shapes(onnx_from_path(str(path)))
        typed = {value.name for value in (*model.graph.value_info, *model.graph.output)}
        assert typed >= {name for node in model.graph.node for name in node.output}
        used = {name for node in model.graph.node for name in node.input} | {v.name for v in model.graph.output}
        assert used >= {tensor.name for tensor in model.graph.initializer}, "no constant that a sanitizer would remove"
        assert all(used & set(node.output) for node in model.graph.node), "and no node"


@pytest.mark.parametrize("bundle", ["compact"], indirect=True)
def test_the_command_says_which_layer(
    copy: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def verify(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["dyexport", "verify", str(copy.root), "--timesteps", "1", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        return int(left.value.code or 0), capsys.readouterr().out

    code, shown = verify("--layers")
    assert code == 0
    assert "largest error of a layer" in shown
    code, shown = verify("--json")
    assert json.loads(shown)["layers"] is None
    overwrite(copy, "segment-00", "blocks.1.fc1.bias", shift_row)
    code, shown = verify("--layers")
    assert code == 1
    assert "first to drift" in shown
    assert "blocks.1.fc1 of segment-00" in shown
    code, shown = verify("--layers", "--json")
    assert code == 1
    assert json.loads(shown)["layers"]["first_drift"]["module"] == "blocks.1.fc1"
