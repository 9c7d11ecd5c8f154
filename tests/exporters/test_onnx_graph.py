"""ONNX graphs: valid, deterministic, free of machine paths, and equal to the masked model in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from dyexport.bundle import Segment
from dyexport.calibration.segments import PlanSettings, make_segments
from dyexport.calibration.tokens import measure_tokens
from dyexport.calibration.widths import read_widths
from dyexport.errors import ExportError
from dyexport.exporters.onnx_graph import STORE, check_onnx, export_onnx
from dyexport.exporters.weight_store import write_store
from dyexport.models.inputs import NoisedInputs
from dyexport.slicing.flops import FlopsModel
from dyexport.slicing.recipes import lay_out
from dyexport.slicing.slicer import UnitOrder, dense_segment, slice_segment
from tests.factories import random_timesteps, shared_tiny_model, spec_of, tiny_preset
from tests.slicing.test_slim import extra_inputs, reader

PATHS = ["masked", "capacity", "dynamic", "compact"]
MODEL, PRESET = shared_tiny_model(), tiny_preset()
INPUTS = NoisedInputs(preset=PRESET, batch_size=2)
WIDTHS = read_widths(MODEL, PRESET.timestep_range)


@pytest.fixture(scope="module")
def stats():
    return measure_tokens(MODEL, INPUTS, points=32, draws=8)


def one_segment(stats, path: str) -> Segment:
    settings = PlanSettings(engines=2, token_path=path, capacity_margin=0.2)
    return make_segments(WIDTHS, stats, FlopsModel.of_preset(PRESET), settings)[0]


def export(segment: Segment, directory: Path) -> Path:
    slice_ = slice_segment(spec_of(PRESET), segment, groups=MODEL.groups)
    layout = lay_out(slice_.recipes.values())
    write_store(layout, reader(MODEL), directory / STORE)
    export_onnx(spec_of(PRESET), segment, slice_, layout, directory / "segment.onnx")
    return directory / "segment.onnx"


@torch.no_grad()
@pytest.mark.parametrize("path", PATHS)
def test_graph_equals_masked_model(stats, path: str, tmp_path: Path) -> None:
    segment = one_segment(stats, path)
    file = export(segment, tmp_path)
    check_onnx(file)
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    compared = 0
    for t in random_timesteps(PRESET, 32):
        if not segment.start <= t < segment.end:
            continue
        for batch in (1, 3):
            inputs = NoisedInputs(preset=PRESET, batch_size=batch).at(t)
            truth = MODEL(inputs)
            extra = extra_inputs(segment, WIDTHS, stats, t)
            room = torch.tensor(segment.capacities) + len(extra.get("slots", ()))
            if path in ("capacity", "dynamic") and (truth.tokens.sum(-1) > room).any():
                continue
            feed = {name: tensor.numpy() for name, tensor in {**inputs, **extra}.items()}
            sample, kept = session.run(["sample", "kept_tokens"], feed)
            np.testing.assert_allclose(sample, truth.sample.numpy(), atol=1e-4)
            assert (kept == truth.tokens.sum(-1).numpy()).all()
            compared += 1
    assert compared >= 8


def test_two_exports_are_identical_and_name_no_paths(tmp_path: Path) -> None:
    segment = dense_segment(spec_of(PRESET), UnitOrder.of(WIDTHS))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = (export(segment, tmp_path / name) for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert (tmp_path / "a" / STORE).read_bytes() == (tmp_path / "b" / STORE).read_bytes()
    content = first.read_bytes()
    for private in (b".py", str(Path.home()).encode(), b"torch."):
        assert private not in content


def test_weights_are_references_only(tmp_path: Path) -> None:
    file = export(dense_segment(spec_of(PRESET), UnitOrder.of(WIDTHS)), tmp_path)
    graph = onnx.load(str(file), load_external_data=False).graph
    inline = [tensor for tensor in graph.initializer if not tensor.external_data]
    assert len(graph.initializer) - len(inline) > 3 * 10
    assert sum(len(tensor.raw_data) for tensor in inline) < 4096
    for tensor in graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        assert entries.get("location", STORE) == STORE


def test_a_weight_the_slice_does_not_know_is_an_error(tmp_path: Path) -> None:
    segment = dense_segment(spec_of(PRESET), UnitOrder.of(WIDTHS))
    slice_ = slice_segment(spec_of(PRESET), segment, groups=MODEL.groups)
    layout = lay_out(slice_.recipes.values())
    slice_.recipes["blocks.9.fc1.weight"] = slice_.recipes["blocks.0.fc1.weight"]  # type: ignore[index]
    with pytest.raises(ExportError, match=r"blocks\.9\.fc1\.weight"):
        export_onnx(spec_of(PRESET), segment, slice_, layout, tmp_path / "x.onnx")


def test_damaged_graph_fails_the_check(stats, tmp_path: Path) -> None:
    file = export(one_segment(stats, "compact"), tmp_path)
    (tmp_path / STORE).unlink()
    with pytest.raises(ExportError, match="not valid ONNX"):
        check_onnx(file)
