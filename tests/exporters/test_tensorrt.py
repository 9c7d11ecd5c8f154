"""TensorRT-RTX: what is refused before the builder is asked, and real plans of every backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from dyexport.build.profiles import largest_topk, parse_profiles, profiles_for
from dyexport.bundle import ModelSpec, Segment, TokenPath, sha256_of
from dyexport.calibration.widths import read_widths
from dyexport.errors import EngineBuildError, EngineMismatch, MissingDependency, UsageError
from dyexport.exporters.onnx_graph import MODULE, OPSET, STORE, export_onnx
from dyexport.exporters.operator_gate import check_operators, find_refusals
from dyexport.exporters.tensorrt_plan import PlanRequest, build_plan
from dyexport.exporters.timing_cache import kept_timings, read_timings
from dyexport.exporters.weight_store import write_store
from dyexport.models.inputs import NoisedInputs
from dyexport.models.random_weights import random_dynamic
from dyexport.plans import ENGINE, INFO, Flavour, PlanInfo, Profile
from dyexport.presets import FluxPreset, Preset, get_preset
from dyexport.slicing.recipes import lay_out
from dyexport.slicing.slicer import (
    Architecture,
    Slice,
    UnitOrder,
    dense_segment,
    slice_conditioning,
    slice_segment,
    spec_of,
)
from dyexport.tensorrt_api import BuildLog, load_api
from tests.factories import tiny_preset
from tests.slicing.cut import Cutter

TINY = {"dit": "dit-digits", "sit": "sit-digits", "latte": "latte-tiny", "flux": "flux-tiny"}
ONE_BLOCK_EACH = FluxPreset(name="flux-1-1", double_blocks=1, single_blocks=1)  # FLUX.1-dev at full width


@pytest.fixture(scope="session")
def rtx() -> None:
    try:
        load_api("tensorrt-rtx")
    except MissingDependency as error:
        pytest.skip(str(error))


def half_width(preset: Preset, path: TokenPath) -> Segment:
    """Every second unit, the others gone; room for three quarters of the tokens."""
    depth, half = preset.depth, tuple(range(0, preset.heads, 2))
    room = preset.tokens // 2 if path == "dynamic" else 3 * preset.tokens // 4
    return Segment(
        start=preset.timestep_range[0],
        end=preset.timestep_range[1],
        heads=(half,) * depth,
        groups=(half,) * depth,
        gated_heads=(True,) * depth,
        gated_groups=(False,) * depth,
        token_paths=(path,) * depth,
        capacities=(room,) * depth,
        slot_buckets=(4, preset.tokens // 4) if path == "dynamic" else (),
    )


def architecture_of(preset: Preset, precision: str = "fp32") -> Architecture:
    spec = spec_of(preset, preset.transformer_config()).model_copy(update={"precision": precision})
    return Architecture(spec=spec, groups=preset.heads, token_routers=True)


def write_graph(slice_: Slice, directory: Path) -> Path:
    """The graph of a slice over a store of noise."""
    layout = lay_out(slice_.recipes.values())
    half = np.random.default_rng(0).integers(0x2C00, 0x3800, layout.nbytes // 2, dtype=np.uint16)  # small in any float
    half.tofile(directory / STORE)
    export_onnx(slice_, layout, directory / "network.onnx")
    return directory / "network.onnx"


def request_for(architecture: Architecture, slice_: Slice, segment: Segment | None, **values: object) -> PlanRequest:
    given = {
        "flavour": "tensorrt-rtx",
        "compute_capabilities": ("8.9",),
        "precision": architecture.spec.precision,
        "inputs": slice_.inputs,
        "profiles": profiles_for(architecture.spec, segment, ()),
        "largest_topk": largest_topk(architecture.spec, segment, profiles_for(architecture.spec, segment, ())),
    }
    return PlanRequest(**{**given, **values})  # type: ignore[arg-type]


def build_segment(preset: Preset, directory: Path, *, path: TokenPath, precision: str = "fp32") -> PlanInfo:
    architecture, segment = architecture_of(preset, precision), half_width(preset, path)
    slice_ = slice_segment(architecture, segment)
    graph = write_graph(slice_, directory)
    return build_plan(graph, request_for(architecture, slice_, segment), directory / "plan")


CASES = [
    ("sit", "fp32", "dynamic"),
    ("dit", "fp16", "dynamic"),
    ("dit", "bf16", "capacity"),
    ("flux", "fp32", "dynamic"),
]
REST = [
    (backbone, precision, path)
    for backbone in TINY
    for precision in ("fp32", "fp16", "bf16")
    for path in ("dynamic", "capacity")
    if (backbone, precision, path) not in CASES
]


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("backbone", "precision", "path"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)]
)
def test_segments_of_every_backbone_build(
    rtx: None, tmp_path: Path, backbone: str, precision: str, path: TokenPath
) -> None:
    preset = get_preset(TINY[backbone])
    info = build_segment(preset, tmp_path, path=path, precision=precision)
    assert PlanInfo.read(tmp_path / "plan" / INFO) == info
    assert info.plan_sha256 == sha256_of(tmp_path / "plan" / ENGINE)
    assert info.graph_sha256 == sha256_of(tmp_path / "network.onnx")
    assert ("slots" in info.profiles[0]) == (path == "dynamic")
    assert [output.name for output in info.outputs] == ["sample", "kept_tokens"]
    assert info.outputs[0].shape[0] == "batch"
    assert any(layer.startswith("topk ") for layer in info.layers)


@pytest.mark.tensorrt
def test_conditioning_and_two_profiles_build(rtx: None, tmp_path: Path) -> None:
    architecture = architecture_of(get_preset("sit-digits"))
    slice_ = slice_conditioning(architecture)
    profiles = profiles_for(architecture.spec, None, parse_profiles(("rows=1:2:2", "rows=50:100:200")))
    request = request_for(architecture, slice_, None, profiles=profiles)
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
def test_full_width_builds(rtx: None, tmp_path: Path, preset: Preset, precision: str, path: TokenPath) -> None:
    info = build_segment(preset, tmp_path, path=path, precision=precision)
    assert info.precision == precision
    assert (tmp_path / "plan" / ENGINE).stat().st_size > 4e6


@pytest.mark.tensorrt
@torch.no_grad()
def test_more_tokens_than_tensorrt_sorts_are_counted_out(rtx: None, tmp_path: Path) -> None:
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

    request = request_for(cutter.architecture, slice_, segment)
    assert request.largest_topk == 3840
    layers = build_plan(tmp_path / "network.onnx", request, tmp_path / "plan").layers
    assert [sum(layer.startswith(kind) for layer in layers) for kind in ("topk ", "cumulative ")] == [1, 1]


def test_flux_counts_text_among_the_tokens_of_single_blocks() -> None:
    flux = replace(ONE_BLOCK_EACH, name="flux")
    architecture = architecture_of(flux)
    segment = half_width(flux, "capacity").model_copy(update={"capacities": (3500, 3500)})
    blocks = slice_segment(architecture, segment).module.blocks
    assert [block.by_score for block in blocks] == [True, False]
    profiles = profiles_for(architecture.spec, segment, ())
    assert largest_topk(architecture.spec, segment, profiles) == 3500
    fewer = segment.model_copy(update={"capacities": (3000, 3000)})
    assert largest_topk(architecture.spec, fewer, profiles) == 3512
    more_text = profiles_for(architecture.spec, segment, parse_profiles(("text_tokens=1:512:1024",)))
    assert largest_topk(architecture.spec, fewer, more_text) == 4024, "which the gate refuses"


@pytest.mark.tensorrt
def test_an_unknown_gpu_is_named(rtx: None, tmp_path: Path) -> None:
    architecture = architecture_of(get_preset("sit-digits"))
    slice_ = slice_conditioning(architecture)
    request = request_for(architecture, slice_, None, compute_capabilities=("3.5",))
    with pytest.raises(EngineBuildError, match=r"compute capability 3\.5; it knows .*8\.9"):
        build_plan(write_graph(slice_, tmp_path), request, tmp_path / "plan")
    assert not (tmp_path / "plan").exists()


@pytest.mark.tensorrt
def test_a_dimension_without_sizes_is_named(rtx: None, tmp_path: Path) -> None:
    architecture = architecture_of(get_preset("sit-digits"))
    slice_ = slice_conditioning(architecture)
    with pytest.raises(EngineBuildError, match="'rows' of timestep; give --profile rows="):
        build_plan(
            write_graph(slice_, tmp_path), request_for(architecture, slice_, None, profiles=({},)), tmp_path / "plan"
        )


@pytest.mark.tensorrt
@pytest.mark.filterwarnings("ignore:.*no-ops in TensorRT-RTX:DeprecationWarning")
def test_timings_are_kept_and_damage_is_left_alone(rtx: None, tmp_path: Path) -> None:
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


def test_classic_tensorrt_needs_what_it_needs() -> None:
    with pytest.raises((MissingDependency, EngineBuildError), match=r"dyexport\[tensorrt\]|GPU of this machine"):
        load_api("tensorrt")


def test_compact_tokens_are_refused_with_their_module(tmp_path: Path) -> None:
    preset = get_preset("sit-digits")
    graph = write_graph(slice_segment(architecture_of(preset), half_width(preset, "compact")), tmp_path)
    with pytest.raises(
        EngineBuildError, match=r"refuses NonZero .* of module 'blocks\.0' \(3 more like it\).*--token-path dynamic"
    ):
        check_operators(onnx.load(graph, load_external_data=False), "tensorrt-rtx", largest_topk=0)
    assert not find_refusals(onnx.load(graph, load_external_data=False), "tensorrt", largest_topk=0)


def model_of(
    node: onnx.NodeProto,
    *constants: onnx.TensorProto,
    inputs: Sequence[onnx.ValueInfoProto] = (),
    outputs: Sequence[onnx.ValueInfoProto] = (),
) -> onnx.ModelProto:
    node.metadata_props.add(key=MODULE, value="blocks.3")
    graph = helper.make_graph([node], "g", inputs, outputs, initializer=constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("op_type", ["ScatterElements", "ScatterND"])
def test_a_reducing_scatter_is_refused(op_type: str, flavour: Flavour) -> None:
    for reduction, refused in (("none", 0), ("add", 1)):
        node = helper.make_node(op_type, ["x", "i", "u"], ["y"], name="s", reduction=reduction)
        found = find_refusals(model_of(node), flavour, largest_topk=0)
        assert len(found) == refused
    assert (found[0].module, found[0].cure) == ("blocks.3", "write rows back with a plain ScatterND")


FLOATS, ROWS, INDICES = [8, 4], [3, 4], {"ScatterND": [3, 1], "ScatterElements": [3, 4]}


def scatter(op_type: str, reduction: str) -> onnx.ModelProto:
    shapes = {"x": FLOATS, "i": INDICES[op_type], "u": ROWS}
    types = {"x": TensorProto.FLOAT, "i": TensorProto.INT64, "u": TensorProto.FLOAT}
    values = [helper.make_tensor_value_info(name, types[name], shape) for name, shape in shapes.items()]
    node = helper.make_node(op_type, list(shapes), ["y"], reduction=reduction)
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, FLOATS)
    return model_of(node, inputs=values, outputs=[out])


def non_zero() -> onnx.ModelProto:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, FLOATS)
    out = helper.make_tensor_value_info("y", TensorProto.INT64, [2, "kept"])
    return model_of(helper.make_node("NonZero", ["x"], ["y"]), inputs=[value], outputs=[out])


def top(count: int) -> onnx.ModelProto:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 5000])
    outs = [
        helper.make_tensor_value_info("v", TensorProto.FLOAT, [2, count]),
        helper.make_tensor_value_info("i", TensorProto.INT64, [2, count]),
    ]
    node = helper.make_node("TopK", ["x", "k"], ["v", "i"])
    return model_of(node, helper.make_tensor("k", TensorProto.INT64, [1], [count]), inputs=[value], outputs=outs)


def takes(model: onnx.ModelProto) -> bool:
    """Whether TensorRT-RTX itself builds it."""
    api = load_api("tensorrt-rtx")
    log = BuildLog(api.trt)
    builder = api.trt.Builder(log.logger)
    network = builder.create_network(0)
    parser = api.trt.OnnxParser(network, log.logger)
    if not parser.parse(model.SerializeToString()):
        return False
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(api.capability("8.9"), 0)
    return builder.build_serialized_network(network, config) is not None


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    "model",
    [
        *(scatter(op_type, reduction) for op_type in INDICES for reduction in ("none", "add")),
        non_zero(),
        top(3840),
        top(3841),
    ],
)
def test_the_gate_refuses_what_the_builder_refuses(rtx: None, model: onnx.ModelProto) -> None:
    assert takes(model) == (not find_refusals(model, "tensorrt-rtx", largest_topk=0))


@pytest.mark.parametrize(("count", "refused"), [(3840, False), (3841, True)])
def test_a_top_of_too_many_is_refused(count: int, refused: bool) -> None:
    node = helper.make_node("TopK", ["x", "k"], ["v", "i"])
    constant = model_of(node, helper.make_tensor("k", TensorProto.INT64, [1], [count]))
    assert bool(find_refusals(constant, "tensorrt", largest_topk=0)) == refused
    assert bool(find_refusals(model_of(node), "tensorrt", largest_topk=count)) == refused


def test_profiles_are_the_models_own_sizes_unless_given() -> None:
    flux = get_preset("flux")
    spec = spec_of(flux, flux.transformer_config())
    usual = profiles_for(spec, half_width(flux, "masked"), ())[0]
    assert usual["image_tokens"] == Profile(min=1024, opt=4096, max=4096)
    assert usual["text_tokens"].max == 512
    assert usual["batch"] == Profile(min=1, opt=2, max=8)
    limited = profiles_for(spec, half_width(flux, "capacity"), parse_profiles(("batch=1:1:1",)))[0]
    assert limited["image_tokens"].min == 3072
    assert limited["batch"].max == 1
    with pytest.raises(UsageError, match="'pixels'; flux has batch"):
        profiles_for(spec, None, parse_profiles(("pixels=1:2:3",)))


@pytest.mark.parametrize("text", ["batch", "batch=", "batch=2:1:3", "batch=0:1:2", "batch=1:2", "=1"])
def test_what_is_not_a_profile(text: str) -> None:
    with pytest.raises(UsageError, match="MIN:OPT:MAX"):
        parse_profiles((text,))


def test_a_description_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(EngineMismatch, match="build the bundle again"):
        PlanInfo.read(tmp_path / INFO)
    (tmp_path / INFO).write_text("{}")
    with pytest.raises(EngineMismatch, match="build the bundle again"):
        PlanInfo.read(tmp_path / INFO)


def test_video_sizes() -> None:
    latte = get_preset("latte-tiny")
    spec: ModelSpec = spec_of(latte, latte.transformer_config())
    profiles = profiles_for(spec, half_width(latte, "masked"), ())[0]
    assert {"frames", "height", "width", "text_tokens", "batch"} <= profiles.keys()
    assert profiles["frames"].max == spec.frames
