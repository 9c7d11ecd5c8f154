"""Both forms of attention, for every backbone: all of it is replaced, and each form equals the masked model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import onnx
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from dyexport.backbones import BACKBONES
from dyexport.bundle.graph_forms import OPSET as FUSED_OPSET
from dyexport.bundle.graph_forms import AttentionForm, fuse_attention
from dyexport.bundle.plan import Segment
from dyexport.bundle.spec import Quantization
from dyexport.bundle.tables import TokenStats, WidthTable
from dyexport.calibration.segments import PlanSettings, make_segments
from dyexport.calibration.tokens import measure_tokens
from dyexport.calibration.widths import read_widths
from dyexport.engines.onnx_file import read_graph
from dyexport.engines.registry import EngineOptions, make_engines
from dyexport.exporters.onnx_graph import OPSET, STORE, export_onnx
from dyexport.exporters.weight_store import write_store
from dyexport.flops import FlopsModel
from dyexport.models.inputs import NoisedInputs
from dyexport.slicing.store_layout import lay_out
from tests.exporters.test_qdq import with_ranges
from tests.factories import random_timesteps, shared_tiny_model, tiny_preset
from tests.slicing.cut import Cutter, assert_kept, fits, routed_inputs

FORMS: tuple[AttentionForm, ...] = get_args(AttentionForm)

pytestmark = pytest.mark.parametrize("backbone", BACKBONES)


class Attentions(TorchFunctionMode):
    """Counts calls of attention."""

    count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is scaled_dot_product_attention
        return function(*args, **(kwargs or {}))


class Exported:
    """One segment of a backbone's tiny model: as a graph over its weights, and what it was cut from."""

    def __init__(self, backbone: str, path: str, folder: Path, quantization: Quantization | None = None) -> None:
        self.model, self.preset = shared_tiny_model(backbone), tiny_preset(backbone)
        self.cutter = Cutter(self.model, self.preset, quantization=quantization)
        self.noise = NoisedInputs(preset=self.preset, batch_size=2)
        self.widths: WidthTable = read_widths(self.model, self.preset.timestep_range)
        self.stats: TokenStats = measure_tokens(self.model, self.noise, points=16, repeats=4)
        settings = PlanSettings(engines=1, token_path=path, capacity_margin=0.2)
        flops = FlopsModel.of_preset(self.preset)
        self.segment: Segment = make_segments(self.widths, self.stats, flops, settings)[0]
        slice_ = self.cutter.cut(self.segment)
        layout = lay_out(slice_.recipes.values())
        write_store(layout, self.cutter.read, folder / STORE)
        self.graph = folder / "network.onnx"
        export_onnx(with_ranges(slice_) if quantization else slice_, layout, self.graph)

    def attentions(self) -> int:
        """Number of calls of attention in one run of the slim module."""
        t = self.segment.start
        routed = routed_inputs(self.segment, self.widths, self.stats, t)
        with torch.no_grad(), Attentions() as calls:
            Cutter(self.model, self.preset).load(self.segment)(**self.cutter.inputs(self.noise.at(t)), **routed)
        return calls.count


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@torch.no_grad()
def test_both_forms_equal_the_masked_model(backbone: str, tmp_path: Path) -> None:
    exported = Exported(backbone, "dynamic", tmp_path)
    assert_all_is_replaced(exported, tmp_path)
    engines = {form: make_engines("onnx", [exported.graph], EngineOptions(attention=form))[0] for form in FORMS}
    compared = 0
    for t in random_timesteps(exported.preset, 16):
        inputs = exported.noise.at(t)
        reference = exported.model(inputs)
        routed = routed_inputs(exported.segment, exported.widths, exported.stats, t)
        if not fits(exported.segment, reference.tokens.sum(-1), len(routed["slots"])):
            continue
        for engine in engines.values():
            outputs = engine.run({**exported.cutter.inputs(inputs), **routed})
            torch.testing.assert_close(outputs.pop("sample"), reference.sample, atol=1e-4, rtol=0)
            assert_kept(exported.segment, list(outputs.values()), reference.tokens)
        compared += 1
    assert compared >= 4


def test_attention_between_quantized_layers_is_replaced(backbone: str, tmp_path: Path) -> None:
    assert_all_is_replaced(Exported(backbone, "masked", tmp_path, "int8"), tmp_path)


def assert_all_is_replaced(exported: Exported, folder: Path) -> None:
    """Every call of attention is one operator, and nothing else of the graph changes its meaning with the opset."""
    message = read_graph(exported.graph)
    count = fuse_attention(message)
    changed = onnx.ModelProto.FromString(message.SerializeToString())
    stored = onnx.load(exported.graph, load_external_data=False)
    assert count == exported.attentions() == kinds(stored).count("Softmax") >= exported.preset.depth
    assert kinds(changed).count("Attention") == count
    assert "Softmax" not in kinds(changed)
    assert [entry.version for entry in changed.opset_import] == [FUSED_OPSET]
    for name in set(kinds(stored)):
        assert_same_operator(name)
    (folder / "fused.onnx").write_bytes(changed.SerializeToString())
    onnx.checker.check_model(folder / "fused.onnx", full_check=True)


def assert_same_operator(name: str) -> None:
    """Opset 23 has the inputs, outputs and defaults that opset 20 has, and may add types and optional attributes."""
    old, new = (onnx.defs.get_schema(name, opset) for opset in (OPSET, FUSED_OPSET))
    assert [value.name for value in old.inputs] == [value.name for value in new.inputs]
    assert [value.name for value in old.outputs] == [value.name for value in new.outputs]
    for key, attribute in new.attributes.items():
        if key in old.attributes:
            assert attribute.default_value == old.attributes[key].default_value
        else:
            assert not attribute.required
