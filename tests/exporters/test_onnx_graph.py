"""ONNX graphs: valid, deterministic, free of machine paths, and equal to the masked model in ONNX Runtime."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from dyexport.bundle.plan import Segment
from dyexport.bundle.tables import UnitOrder
from dyexport.calibration.segments import PlanSettings, make_segments
from dyexport.calibration.tokens import measure_tokens
from dyexport.calibration.widths import read_widths
from dyexport.errors import ExportError
from dyexport.exporters.onnx_graph import STORE, check_onnx, export_onnx
from dyexport.exporters.weight_store import write_store
from dyexport.flops import FlopsModel
from dyexport.models.inputs import NoisedInputs
from dyexport.models.random_weights import random_dynamic
from dyexport.slicing.slicer import Slice, dense_segment, slice_conditioning
from dyexport.slicing.store_layout import lay_out
from tests.exporters.networks import ONE_BLOCK_EACH, dense_network
from tests.factories import random_timesteps, tiny_preset
from tests.slicing.cut import Cutter, assert_kept, fits, routed_inputs

PATHS = ["masked", "capacity", "dynamic", "compact"]
PRESET = replace(tiny_preset(), layers=2)
MODEL = random_dynamic(PRESET)
CUTTER = Cutter(MODEL, PRESET)
INPUTS = NoisedInputs(preset=PRESET, batch_size=2)
WIDTHS = read_widths(MODEL, PRESET.timestep_range)


@pytest.fixture(scope="module")
def stats():
    return measure_tokens(MODEL, INPUTS, points=32, repeats=8)


def one_segment(stats, path: str) -> Segment:
    settings = PlanSettings(engines=2, token_path=path, capacity_margin=0.2)
    return make_segments(WIDTHS, stats, FlopsModel.of_preset(PRESET), settings)[0]


def export(slice_: Slice, directory: Path) -> Path:
    layout = lay_out(slice_.recipes.values())
    write_store(layout, CUTTER.read, directory / STORE)
    export_onnx(slice_, layout, directory / "network.onnx")
    return directory / "network.onnx"


def dense_slice() -> Slice:
    return CUTTER.cut(dense_segment(CUTTER.spec, UnitOrder.of(WIDTHS)))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph of the dense network, next to its store. It is not to be written to."""
    return export(dense_slice(), tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def conditioning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph of the conditioning network, next to its store. It is not to be written to."""
    return export(slice_conditioning(CUTTER.context), tmp_path_factory.mktemp("conditioning"))


@pytest.fixture
def copied(dense: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dense.parent, tmp_path / "copy")) / dense.name


def shapes(session: ort.InferenceSession) -> dict[str, list[int | str]]:
    return {value.name: value.shape for value in (*session.get_inputs(), *session.get_outputs())}


@torch.no_grad()
@pytest.mark.parametrize("path", PATHS)
def test_graph_equals_masked_model(stats, path: str, tmp_path: Path) -> None:
    segment = one_segment(stats, path)
    slice_ = CUTTER.cut(segment)
    file = export(slice_, tmp_path)
    check_onnx(file)
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert {spec.name: list(spec.shape) for spec in slice_.inputs}.items() <= shapes(session).items()
    compared = 0
    for t in random_timesteps(PRESET, 32):
        if not segment.start <= t < segment.end:
            continue
        for batch in (1, 3):
            inputs = NoisedInputs(preset=PRESET, batch_size=batch).at(t)
            truth = MODEL(inputs)
            routed = routed_inputs(segment, WIDTHS, stats, t)
            if not fits(segment, truth.tokens.sum(-1), len(routed.get("slots", ()))):
                continue
            feed = {name: tensor.numpy() for name, tensor in {**CUTTER.inputs(inputs), **routed}.items()}
            sample, *kept = session.run(None, feed)
            np.testing.assert_allclose(sample, truth.sample.numpy(), atol=1e-4)
            assert_kept(segment, [torch.from_numpy(counts) for counts in kept], truth.tokens)
            compared += 1
    assert compared >= 8


@torch.no_grad()
def test_conditioning_graph_equals_the_module(conditioning: Path) -> None:
    check_onnx(conditioning)
    session = ort.InferenceSession(str(conditioning), providers=["CPUExecutionProvider"])
    size = CUTTER.inputs(INPUTS.at(0.0))["modulation"].shape[1]
    assert shapes(session) == {"timestep": ["rows"], "class_labels": ["rows"], "modulation": ["rows", size]}
    for rows in (1, 2, 50):
        t = torch.tensor(random_timesteps(PRESET, rows))
        labels = torch.arange(rows) % (PRESET.classes + 1)
        (modulation,) = session.run(None, {"timestep": t.numpy(), "class_labels": labels.numpy()})
        np.testing.assert_allclose(modulation, CUTTER.conditioning(t, labels).numpy(), atol=1e-5)


def test_two_exports_are_identical_and_name_no_paths(dense: Path, tmp_path: Path) -> None:
    again = export(dense_slice(), tmp_path)
    assert again.read_bytes() == dense.read_bytes()
    assert again.with_name(STORE).read_bytes() == dense.with_name(STORE).read_bytes()
    content = dense.read_bytes()
    for private in (b".py", str(Path.home()).encode(), b"torch."):
        assert private not in content


@pytest.mark.parametrize(
    ("network", "slice_"), [("dense", dense_slice()), ("conditioning", slice_conditioning(CUTTER.context))]
)
def test_weights_are_references_only(network: str, slice_: Slice, request: pytest.FixtureRequest) -> None:
    graph = onnx.load(str(request.getfixturevalue(network)), load_external_data=False).graph
    inline = [tensor for tensor in graph.initializer if not tensor.external_data]
    assert len(graph.initializer) - len(inline) == len(slice_.recipes)
    assert sum(len(tensor.raw_data) for tensor in inline) < 4096
    for tensor in graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        assert entries.get("location", STORE) == STORE


def test_a_weight_the_slice_does_not_know_is_an_error(tmp_path: Path) -> None:
    slice_ = slice_conditioning(CUTTER.context)
    layout = lay_out(slice_.recipes.values())
    slice_.recipes["blocks.9.weight"] = slice_.recipes["blocks.0.weight"]  # type: ignore[index]
    with pytest.raises(ExportError, match=r"blocks\.9\.weight"):
        export_onnx(slice_, layout, tmp_path / "x.onnx")


def test_damaged_graph_fails_the_check(copied: Path) -> None:
    copied.with_name(STORE).unlink()
    with pytest.raises(ExportError, match="not valid ONNX"):
        check_onnx(copied)


def test_a_store_that_is_too_short_fails_the_check(copied: Path) -> None:
    check_onnx(copied)
    short = copied.with_name(STORE).stat().st_size // 2
    with copied.with_name(STORE).open("r+b") as store:
        store.truncate(short)
    with pytest.raises(ExportError, match=rf"end at byte \d+ of weights\.bin, which has {short}$"):
        check_onnx(copied)


def test_a_network_of_full_width_is_exported_without_a_weight(tmp_path: Path) -> None:
    """FLUX.1-dev's width, in one double and one single block: norms have larger constants than in small models."""
    slice_ = dense_network(ONE_BLOCK_EACH, "bf16")
    export_onnx(slice_, lay_out(slice_.recipes.values()), tmp_path / "network.onnx")
    assert (tmp_path / "network.onnx").stat().st_size < 2**18 < slice_.nbytes
