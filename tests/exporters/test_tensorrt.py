"""TensorRT-RTX: real plans of every backbone, and what its builder is asked for in vain."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnxruntime as ort
import pytest
import torch

from dyexport.backbones.base import Preset
from dyexport.bundle.graph_forms import AttentionForm
from dyexport.bundle.plan import TokenPath
from dyexport.bundle.plan_info import ENGINE, INFO, OLDEST_FP32, PlanInfo
from dyexport.bundle.spec import Precision, Quantization
from dyexport.bundle.tables import UnitOrder
from dyexport.calibration.widths import read_widths
from dyexport.digests import sha256_of
from dyexport.errors import EngineBuildError, EngineMismatchError, MissingDependencyError, UsageError
from dyexport.exporters.onnx_graph import STORE, export_onnx
from dyexport.exporters.tensorrt_attention import supported_form
from dyexport.exporters.tensorrt_plan import build_plan
from dyexport.exporters.tensorrt_profiles import parse_profiles, profiles_for
from dyexport.exporters.timing_cache import kept_timings, read_timings
from dyexport.exporters.weight_store import write_store
from dyexport.models.inputs import NoisedInputs
from dyexport.models.random_weights import random_dynamic
from dyexport.presets import get_preset
from dyexport.slicing.slicer import dense_segment, slice_conditioning, slice_segment
from dyexport.slicing.store_layout import lay_out
from dyexport.tensorrt_api import BuildLog, load_api
from tests.exporters.networks import (
    ONE_BLOCK_EACH,
    build_segment,
    half_width,
    request_for,
    slice_context,
    write_graph,
)
from tests.exporters.test_qdq import with_ranges
from tests.factories import tiny_preset
from tests.pipeline.tiny import TINY as SIT_TINY
from tests.pipeline.tiny import shallow
from tests.slicing.cut import Cutter
from tests.slicing.test_quantizing import PRESETS

TINY: dict[str, Preset] = {
    "dit": replace(get_preset("dit-digits"), layers=2),
    "sit": SIT_TINY,
    "latte": shallow("latte-tiny"),
    "flux": shallow("flux-tiny"),
    "qwen_image": shallow("qwen-image-tiny"),
}
CASES = [(backbone, "fp32", "dynamic") for backbone in TINY]
REST = [
    (backbone, precision, path)
    for backbone in TINY
    for precision in ("fp32", "fp16", "bf16")
    for path in ("dynamic", "capacity")
    if (backbone, precision, path) not in CASES
]
FORMS = [("sit", "bf16"), ("flux", "fp32")]


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("backbone", "precision", "path"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)]
)
def test_segments_of_every_backbone_build(
    rtx: Any, tmp_path: Path, backbone: str, precision: str, path: TokenPath
) -> None:
    preset = TINY[backbone]
    info = build_segment(preset, tmp_path, path=path, precision=precision)
    assert PlanInfo.read(tmp_path / "plan" / INFO) == info
    assert info.plan_sha256 == sha256_of(tmp_path / "plan" / ENGINE)
    assert info.graph_sha256 == sha256_of(tmp_path / "network.onnx")
    assert ("slots" in info.profiles[0]) == (path == "dynamic")
    assert [output.name for output in info.outputs] == ["sample", "kept_tokens"]
    assert info.outputs[0].shape[0] == "batch"
    assert any(layer.startswith("topk ") for layer in info.layers)


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("backbone", "precision"),
    [
        *FORMS,
        *(
            pytest.param(backbone, precision, marks=pytest.mark.slow)
            for backbone in TINY
            for precision in ("fp32", "fp16", "bf16")
            if (backbone, precision) not in FORMS
        ),
    ],
)
def test_both_forms_of_attention_build(rtx: Any, tmp_path: Path, backbone: str, precision: Precision) -> None:
    """In fp32 TensorRT-RTX has no fused kernel, and must be allowed to decompose the layer."""
    preset = TINY[backbone]
    context, segment = slice_context(preset, precision), half_width(preset, "dynamic")
    slice_ = slice_segment(context, segment)
    graph, layers = write_graph(slice_, tmp_path), {}
    for form in get_args(AttentionForm):
        request = request_for(context, slice_, segment, attention=form)
        info = build_plan(graph, request, tmp_path / form)
        assert info.graph_sha256 == sha256_of(graph)
        layers[form] = Counter(layer.split()[0] for layer in info.layers)
    assert layers["fused"]["attention_input"] == layers["fused"]["attention_output"] == layers["primitive"]["softmax"]
    assert layers["fused"]["softmax"] == layers["primitive"]["attention_input"] == 0
    assert supported_form(rtx) == "fused"
    assert layers["primitive"]["softmax"] >= preset.depth


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("backbone", "precision", "quantization"),
    [
        ("sit", "fp32", "int8"),
        ("sit", "fp16", "fp8"),
        *(
            pytest.param(backbone, precision, quantization, marks=pytest.mark.slow)
            for backbone, precision in (("flux", "bf16"), ("latte", "fp16"))
            for quantization in ("int8", "fp8")
        ),
    ],
)
def test_quantized_segments_build(
    rtx: Any, tmp_path: Path, backbone: str, precision: Precision, quantization: Quantization
) -> None:
    preset = PRESETS[backbone]
    context, segment = slice_context(preset, precision), half_width(preset, "dynamic")
    spec = context.spec.model_copy(update={"quantization": quantization})
    slice_ = with_ranges(slice_segment(replace(context, spec=spec), segment))
    graph = write_graph(slice_, tmp_path)
    info = build_plan(graph, request_for(context, slice_, segment), tmp_path / "plan")
    kinds = Counter(layer.split()[0] for layer in info.layers)
    assert kinds["quantize"] == len(slice_.ranges)
    assert kinds["attention_input"] >= preset.depth


@pytest.mark.tensorrt
def test_conditioning_and_two_profiles_build(rtx: Any, tmp_path: Path) -> None:
    context = slice_context(get_preset("sit-digits"))
    slice_ = slice_conditioning(context)
    profiles = profiles_for(context.spec, None, parse_profiles(("rows=1:2:2", "rows=50:100:200")))
    request = request_for(context, slice_, None, profiles=profiles)
    info = build_plan(write_graph(slice_, tmp_path), request, tmp_path / "plan")
    assert [each["rows"].max for each in info.profiles] == [2, 200]
    assert (tmp_path / "plan" / ENGINE).stat().st_size > 0


@pytest.mark.tensorrt
@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "precision", "path"),
    [
        (get_preset("dit-s-2"), "fp32", "dynamic"),
        (ONE_BLOCK_EACH, "bf16", "dynamic"),
        (ONE_BLOCK_EACH, "bf16", "masked"),
    ],
    ids=lambda value: value.name if isinstance(value, Preset) else value,
)
def test_full_width_builds(rtx: Any, tmp_path: Path, preset: Preset, precision: str, path: TokenPath) -> None:
    info = build_segment(preset, tmp_path, path=path, precision=precision)
    assert info.precision == precision
    assert (tmp_path / "plan" / ENGINE).stat().st_size > 4e6


@pytest.mark.tensorrt
@torch.no_grad()
def test_more_tokens_than_tensorrt_sorts_are_counted_out(rtx: Any, tmp_path: Path) -> None:
    """4096 tokens, of which one block sorts as many as TensorRT can and the other one has room for more."""
    preset = replace(tiny_preset(), name="large", layers=2, patch_size=1, sample_size=64)
    cutter = Cutter(random_dynamic(preset, seed=2), preset)
    inputs, widths = NoisedInputs(preset=preset, batch_size=1).at(400.0), read_widths(cutter.model, (0, 1000))
    limited = {"token_paths": ("capacity",) * 2, "capacities": (3840, 4000)}
    gated = {"gated_heads": (True,) * 2, "gated_groups": (True,) * 2}
    segment = dense_segment(cutter.spec, UnitOrder.of(widths)).model_copy(update={**limited, **gated})
    slice_ = cutter.cut(segment)
    layout = lay_out(slice_.recipes.values())
    write_store(layout, cutter.read, tmp_path / STORE)
    export_onnx(slice_, layout, tmp_path / "network.onnx")
    gate = torch.from_numpy(segment.width_gate(widths, widths.row(400.0)))  # (W,)
    feed = {name: tensor.numpy() for name, tensor in {**cutter.inputs(inputs), "width_gate": gate}.items()}
    sample, kept = ort.InferenceSession(str(tmp_path / "network.onnx")).run(None, feed)
    assert (kept <= segment.capacities).all()
    np.testing.assert_allclose(sample, cutter.model(inputs).sample.numpy(), atol=1e-4)

    request = request_for(cutter.context, slice_, segment)
    assert request.largest_topk == 3840
    layers = build_plan(tmp_path / "network.onnx", request, tmp_path / "plan").layers
    assert [sum(layer.startswith(kind) for layer in layers) for kind in ("topk ", "cumulative ")] == [1, 1]


@pytest.mark.tensorrt
def test_weights_that_may_be_streamed(rtx: Any, tmp_path: Path) -> None:
    context = slice_context(get_preset("sit-digits"))
    slice_ = slice_conditioning(context)
    graph, streamed = write_graph(slice_, tmp_path), {}
    for stream in (False, True):
        out = tmp_path / f"{stream}"
        info = build_plan(graph, request_for(context, slice_, None, stream_weights=stream), out)
        assert PlanInfo.read(out / INFO).streamable == info.streamable == stream
        streamed[stream] = info.plan_sha256
    assert streamed[True] != streamed[False], "the builder got the setting"


@pytest.mark.tensorrt
def test_an_unknown_gpu_is_named(rtx: Any, tmp_path: Path) -> None:
    context = slice_context(get_preset("sit-digits"))
    slice_ = slice_conditioning(context)
    request = request_for(context, slice_, None, compute_capabilities=("9.0",))
    with pytest.raises(UsageError, match=r"compute capability 9\.0; it knows 8\.0, 8\.6, 8\.9, 12\.0"):
        build_plan(write_graph(slice_, tmp_path), request, tmp_path / "plan")
    assert not (tmp_path / "plan").exists()


@pytest.mark.tensorrt
def test_a_dimension_without_sizes_is_named(rtx: Any, tmp_path: Path) -> None:
    context = slice_context(get_preset("sit-digits"))
    slice_ = slice_conditioning(context)
    with pytest.raises(EngineBuildError, match="'rows' of timestep; give --profile rows="):
        build_plan(write_graph(slice_, tmp_path), request_for(context, slice_, None, profiles=({},)), tmp_path / "plan")


@pytest.mark.tensorrt
@pytest.mark.filterwarnings("ignore:.*no-ops in TensorRT-RTX:DeprecationWarning")
def test_timings_are_kept_and_damage_is_left_alone(rtx: Any, tmp_path: Path) -> None:
    """With the RTX builder's stub of a cache, as the classic builder would be used."""
    rtx_api, path = load_api("tensorrt-rtx"), tmp_path / "timings" / "tensorrt-1"
    config = rtx_api.trt.Builder(BuildLog(rtx_api.trt).logger).create_builder_config()
    with kept_timings(rtx_api, config, path):
        pass
    assert not path.exists(), "RTX measures nothing"
    measuring = replace(rtx_api, measures=True)
    with kept_timings(measuring, config, path):
        assert not path.exists(), "not before it is measured"
    kept = read_timings(path)
    assert len(kept) > 100
    assert kept == bytes(config.get_timing_cache().serialize())
    for damaged in (path.read_bytes()[:-1], b"x" + path.read_bytes()[1:], b""):
        path.write_bytes(damaged)
        assert read_timings(path) == b""
        with kept_timings(measuring, config, path):
            pass
        assert read_timings(path) == kept
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.tensorrt
def test_the_capabilities_of_a_builder_are_sorted_and_run_every_bundle(rtx: Any) -> None:
    known = [float(text) for text in load_api("tensorrt-rtx").capabilities()]
    assert known == sorted(known)
    assert known[0] == OLDEST_FP32
    assert max(known) >= 12


def test_classic_tensorrt_needs_what_it_needs() -> None:
    """The GPU is named before the package, which is of no use without it."""
    gpu = r"torch sees none(, nor is TensorRT installed)?; build where"
    with pytest.raises((MissingDependencyError, EngineBuildError), match=rf"dyexport\[tensorrt\]|{gpu}") as error:
        load_api("tensorrt")
    if not torch.cuda.is_available():
        installed = find_spec("tensorrt") is not None
        assert ("nor is TensorRT installed" in str(error.value)) != installed


def test_a_description_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(EngineMismatchError, match="make it again with `dyexport compile`"):
        PlanInfo.read(tmp_path / INFO)
    (tmp_path / INFO).write_text("{}")
    with pytest.raises(EngineMismatchError, match="make it again with `dyexport compile`"):
        PlanInfo.read(tmp_path / INFO)
