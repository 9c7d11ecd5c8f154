"""TensorRT-RTX plans in a build: made once, from the graphs that verify checks, and made again only where need be."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dyexport.bundle.manifest import CONDITIONING
from dyexport.bundle.plan import segment_name
from dyexport.bundle.plan_info import ENGINE, INFO, PlanInfo
from dyexport.bundle.reader import Bundle
from dyexport.cli import main
from dyexport.engines.registry import BACKENDS, Backend, get_backend
from dyexport.engines.tensorrt_fit import version_mismatch
from dyexport.errors import BundleError, EngineBuildError, EngineMismatchError, MissingDependencyError, UsageError
from dyexport.exporters.tensorrt_profiles import TensorrtSettings
from dyexport.pipeline.build import build_bundle, opened, price_plans
from dyexport.pipeline.settings import BuildSettings
from dyexport.runtime.loading import load
from dyexport.runtime.stock import example_inputs
from dyexport.stages.file_records import digest_of_spans
from dyexport.stages.ledger import NullListener
from dyexport.verification.settings import VerifySettings
from dyexport.verification.verify import verify_bundle
from tests.pipeline.tiny import TINY, build, redone, tiny_settings

NETWORKS = ("segment-00", "segment-01", "conditioning")


@pytest.fixture(scope="module")
def settings(rtx: Any, tmp_path_factory: pytest.TempPathFactory) -> BuildSettings:
    return tiny_settings(
        tmp_path_factory.mktemp("plans"),
        engines=2,
        targets=("tensorrt-rtx",),
        tensorrt=TensorrtSettings(compute_capabilities=("8.9", "12.0")),
    )


@pytest.fixture(scope="module")
def bundle(settings: BuildSettings) -> Bundle:
    return build(settings)


@pytest.mark.tensorrt
def test_every_network_has_a_plan_of_the_graph_that_onnx_runtime_runs(bundle: Bundle) -> None:
    plans, graphs = bundle.engine_paths("tensorrt-rtx"), bundle.engine_paths("onnx")
    assert set(plans) == set(graphs) == set(NETWORKS)
    for name, path in plans.items():
        info = PlanInfo.read(path.with_name(INFO))
        assert info.graph_sha256 == bundle.manifest.files[f"graphs/{name}.onnx"].sha256
        assert info.plan_sha256 == bundle.manifest.files[f"engines/tensorrt-rtx/{name}/{ENGINE}"].sha256
        assert info.compute_capabilities == ("8.9", "12.0")
    assert set(bundle.manifest.plan.segments[0].token_paths) <= {"dynamic", "masked"}
    assert verify_bundle(bundle.root, VerifySettings(timesteps=16)).passed


@pytest.mark.tensorrt
def test_each_of_four_engines_has_a_plan(rtx: Any, tmp_path: Path) -> None:
    bundle = build(tiny_settings(tmp_path, engines=4, targets=("tensorrt-rtx",)))
    names = {segment_name(index) for index in range(4)} | {CONDITIONING}
    assert len(bundle.manifest.plan.segments) == 4
    assert set(bundle.engine_paths("tensorrt-rtx")) == names


@pytest.mark.tensorrt
def test_what_plans_take_is_recorded_and_predicted(settings: BuildSettings, bundle: Bundle, tmp_path: Path) -> None:
    with opened(settings, NullListener()) as run:
        build_bundle(run)
        report = {name: stage for name, stage in run.stage_report.items() if name.startswith("tensorrt-rtx")}
        same, four = (priced.tensorrt["tensorrt-rtx"] for priced in price_plans(run, (2, 4)))
    seconds = {name.partition(" ")[2]: stage["made_in"] for name, stage in report.items()}
    assert {stage["status"] for stage in report.values()} == {"reused"}
    assert same.timed == 3
    assert same.seconds == pytest.approx(sum(seconds.values()))
    assert four.seconds == pytest.approx(2 * sum(seconds.values()) - seconds["conditioning"])
    files = sum(path.stat().st_size for path in bundle.engine_paths("tensorrt-rtx").values())
    assert same.bytes < files, "weights, and what TensorRT adds"

    elsewhere = replace(settings, work=tmp_path / "work", out=tmp_path / "bundle")
    with opened(elsewhere, NullListener()) as run:
        unknown = price_plans(run, [2])[0].tensorrt["tensorrt-rtx"]
    assert (unknown.bytes, unknown.seconds, unknown.timed) == (same.bytes, None, 0)


@pytest.mark.tensorrt
def test_only_what_is_missing_or_damaged_is_built_again(settings: BuildSettings, bundle: Bundle) -> None:
    made = settings.work / "engines" / "tensorrt-rtx"
    for name in NETWORKS[1:]:
        shutil.rmtree(made / name)  # as if killed after the first
    assert redone(settings) - {"bundle"} == {f"tensorrt-rtx {name}" for name in NETWORKS[1:]}
    plan = made / NETWORKS[0] / ENGINE
    plan.write_bytes(plan.read_bytes()[:-1] + b"x")
    assert redone(settings) - {"bundle"} == {f"tensorrt-rtx {NETWORKS[0]}"}
    other = replace(settings, tensorrt=replace(settings.tensorrt, profiles=("batch=1:1:1",)))
    assert redone(other) - {"bundle"} == {f"tensorrt-rtx {name}" for name in NETWORKS}
    build(settings)


@pytest.mark.tensorrt
def test_another_version_of_the_builder_makes_every_plan_again(
    rtx: Any, settings: BuildSettings, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NETWORKS:
        with opened(settings, NullListener(), without=frozenset({f"tensorrt-rtx {name}"})) as run:
            build_bundle(run)
            assert run.ledger.outcomes[f"tensorrt-rtx {name}"].reused
            with monkeypatch.context() as patch:
                patch.setattr(rtx, "__version__", "1.6.0")
                with pytest.raises(UsageError, match=rf"{name}' must run first \(its inputs changed\)"):
                    build_bundle(run)


def change_a_byte(checkpoint: Path, name: str, row: int = 0) -> None:
    """The lowest bit of the first number in a row of a weight."""
    file = checkpoint / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    size = int.from_bytes(content[:8], "little")
    tensor = json.loads(content[8 : 8 + size])[name]
    first, end = tensor["data_offsets"]
    content[8 + size + first + row * (end - first) // tensor["shape"][0]] ^= 1
    file.write_bytes(content)


@pytest.mark.tensorrt
def test_one_byte_of_the_checkpoint_rebuilds_what_reads_it_and_no_more(
    settings: BuildSettings, bundle: Bundle, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "dynamic"
    shutil.copytree(settings.work / "calibrated", checkpoint)
    given = {"random_weights": False, "checkpoint": str(checkpoint), "budget": None}
    places = {"out": tmp_path / "bundle", "work": tmp_path / "work"}
    settings = replace(settings, tensorrt=TensorrtSettings(compute_capabilities=("8.9",)), **places, **given)
    first, second = build(settings).manifest.plan.segments
    model = {"static", "dynamic", "calibrate", "plan", "golden", "weights", "bundle"}

    change_a_byte(checkpoint, "transformer_blocks.1.norm1.linear.weight")
    assert redone(settings) == model | {"tensorrt-rtx conditioning"}

    block, head = next((b, u) for b in range(TINY.depth) for u in set(first.heads[b]) ^ set(second.heads[b]))
    change_a_byte(
        checkpoint, f"transformer_blocks.{block}.attn1.to_v.weight", row=head * TINY.hidden_size // TINY.heads
    )
    owner = NETWORKS[0] if head in first.heads[block] else NETWORKS[1]
    assert redone(settings) == model | {f"tensorrt-rtx {owner}"}


@pytest.mark.tensorrt
def test_a_damaged_plan_of_a_bundle_is_named(bundle: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle.root, copy)
    plan = copy / "engines" / "tensorrt-rtx" / "segment-01" / ENGINE
    plan.write_bytes(plan.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match=r"tensorrt-rtx/segment-01/engine\.plan"):
        load(copy, target="tensorrt-rtx", check_hashes=False)


@pytest.mark.tensorrt
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_onnx_runtime_takes_over_and_says_so(bundle: Bundle) -> None:
    with pytest.warns(UserWarning, match=r"run on NVIDIA GPUs .* running its ONNX graphs"):
        taken_over = load(bundle.root, target="tensorrt-rtx")
    inputs = example_inputs(bundle.manifest.model, 2, 0.3)
    assert torch.equal(taken_over(**inputs).sample, load(bundle.root)(**inputs).sample)
    with pytest.raises(EngineMismatchError, match="run on NVIDIA GPUs"):
        load(bundle.root, target="tensorrt-rtx", fallback=False)(**inputs)
    with pytest.raises(EngineMismatchError, match="run on NVIDIA GPUs"):  # or it would vouch for what it did not run
        verify_bundle(bundle.root, VerifySettings(timesteps=1, target="tensorrt-rtx"))


@pytest.mark.tensorrt
def test_a_plan_of_another_version_gives_way_to_its_graph_compiled_anew(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = version_mismatch(
        PlanInfo.read(bundle.engine_paths("tensorrt-rtx")["segment-00"].with_name(INFO)), "9.9", "8.9"
    )
    rtx = replace(get_backend("tensorrt-rtx"), incompatibility=lambda path: reason)
    provider = get_backend("onnx")  # in the place of the one that needs a GPU

    def loaded(backends: dict[str, Backend], message: str) -> torch.Tensor:
        with monkeypatch.context() as patched:
            for name, backend in backends.items():
                patched.setitem(BACKENDS, name, lambda backend=backend: backend)
            with pytest.warns(UserWarning, match=message):
                return load(bundle.root, target="tensorrt-rtx")(**inputs).sample

    inputs = example_inputs(bundle.manifest.model, 2, 0.3)
    wanted = load(bundle.root)(**inputs).sample
    compiled = loaded({"tensorrt-rtx": rtx, "onnx-rtx": provider}, "built by .* 9.9 is installed; .*target 'onnx-rtx'")
    absent = replace(provider, incompatibility=lambda path: "no provider")
    plain = loaded({"tensorrt-rtx": rtx, "onnx-rtx": absent}, "built by .* 9.9 is installed; .*target 'onnx'")
    assert torch.equal(compiled, wanted)
    assert torch.equal(plain, wanted)


@pytest.mark.tensorrt
def test_inspect_shows_a_plan(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "inspect", bundle.root, "--engine", "tensorrt-rtx/segment-01", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["flavour"], shown["profiles"][0]["batch"]["max"]) == ("tensorrt-rtx", 8)
    assert len(shown["layers"]) > 50
    assert run(monkeypatch, "inspect", bundle.root, "--engine", "tensorrt-rtx/segment-01") == 0
    assert "before fusion" in capsys.readouterr().out
    assert run(monkeypatch, "inspect", bundle.root, "--engine", "tensorrt-rtx/dense") == 2
    assert "no tensorrt-rtx plan of 'dense'" in capsys.readouterr().err


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["dyexport", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


@pytest.mark.tensorrt
def test_plan_says_what_plans_would_take(
    settings: BuildSettings, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--work", settings.work, "--target", "tensorrt-rtx", "--no-baseline"]
    assert run(monkeypatch, "plan", "-m", TINY.name, "-b", 0.5, "--random-weights", *places, "--json") == 0
    costs = [row["tensorrt"]["tensorrt-rtx"] for row in json.loads(capsys.readouterr().out)["plans"]]
    assert [cost["timed"] for cost in costs] == [3] * 5
    assert sorted(cost["seconds"] for cost in costs) == [cost["seconds"] for cost in costs]


def test_targets_are_listed_with_what_proves_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "targets", "--json") == 0
    targets = json.loads(capsys.readouterr().out)["targets"]
    assert all("fp8" in each["quantized"] for each in targets)
    proof = {each["name"]: each["proof"] for each in targets}
    assert "untested on a GPU" in proof["tensorrt-rtx"]
    assert "never built" in proof["tensorrt"]
    assert "untested on a GPU" in proof["torch-tensorrt"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("target", ["tensorrt", "torch-tensorrt"])
def test_what_needs_a_gpu_says_so_before_any_work(tmp_path: Path, target: str) -> None:
    with pytest.raises((MissingDependencyError, EngineBuildError), match=rf"dyexport\[{target}\]|GPU of this machine"):
        build(tiny_settings(tmp_path, targets=(target,)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"targets": ("tensorrt-rtx",), "token_path": "compact"}, "allocates by data"),
        ({"tensorrt": TensorrtSettings(compute_capabilities=("8.9",))}, "add --target tensorrt-rtx"),
        ({"tensorrt": TensorrtSettings(profiles=("batch=1:2:4",))}, "add --target tensorrt-rtx"),
        ({"tensorrt": TensorrtSettings(stream_weights=True)}, "add --target tensorrt-rtx"),
        (
            {"tensorrt": TensorrtSettings(stream_weights=True), "targets": ("torch-tensorrt",)},
            "add --target tensorrt-rtx",
        ),
    ],
)
def test_what_cannot_be_asked_of_tensorrt(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tiny_settings(tmp_path, **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"compute_capabilities": ("ada",)}, "'ada' is not one; write 8.9"),
        ({"profiles": ("batch=4", "x")}, "MIN:OPT:MAX"),
    ],
)
def test_what_tensorrt_settings_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TensorrtSettings(**values)


def test_the_path_for_tokens_follows_the_targets(tmp_path: Path) -> None:
    assert tiny_settings(tmp_path).planned_token_path == "auto"
    rigid = tiny_settings(tmp_path, targets=("tensorrt-rtx",))
    assert (rigid.planned_token_path, rigid.formats) == ("dynamic", ("onnx", "tensorrt-rtx"))
    assert replace(rigid, token_path="capacity").planned_token_path == "capacity"


def test_a_digest_sees_its_spans_alone(tmp_path: Path) -> None:
    file = tmp_path / "store"
    file.write_bytes(bytes(100))
    before = digest_of_spans(file, [(0, 10), (50, 10)])
    file.write_bytes(bytes(20) + b"x" + bytes(79))
    assert digest_of_spans(file, [(0, 10), (50, 10)]) == before
    file.write_bytes(bytes(55) + b"x" + bytes(44))
    assert digest_of_spans(file, [(0, 10), (50, 10)]) != before
