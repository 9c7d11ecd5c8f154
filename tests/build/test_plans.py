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

from dyexport.build.ledger import Silent, digest_of_spans
from dyexport.build.pipeline import opened
from dyexport.build.settings import BuildSettings
from dyexport.build.verify import VerifySettings, verify_bundle
from dyexport.bundle import Bundle
from dyexport.cli import main
from dyexport.errors import BundleError, EngineMismatch, MissingDependency, UsageError
from dyexport.plans import ENGINE, INFO, PlanInfo
from dyexport.runtime.pipeline import load
from dyexport.runtime.transformers import example_inputs
from dyexport.tensorrt_api import load_api
from tests.build.tiny import tiny_settings

NETWORKS = ("segment-00", "segment-01", "conditioning")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> BuildSettings:
    try:
        load_api("tensorrt-rtx")
    except MissingDependency as error:
        pytest.skip(str(error))
    return tiny_settings(
        tmp_path_factory.mktemp("plans"), engines=2, targets=("tensorrt-rtx",), compute_capabilities=("8.9", "12.0")
    )


def build(settings: BuildSettings) -> tuple[Bundle, set[str]]:
    """The bundle, and the stages that were done anew."""
    with opened(settings, Silent()) as pipeline:
        pipeline.bundle()
        report = pipeline.stage_report
    return Bundle.open(settings.out), {name for name, stage in report.items() if stage["status"] == "done"}


@pytest.fixture(scope="module")
def bundle(settings: BuildSettings) -> Bundle:
    return build(settings)[0]


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
def test_only_what_is_missing_or_damaged_is_built_again(settings: BuildSettings, bundle: Bundle) -> None:
    made = settings.work / "engines" / "tensorrt-rtx"
    for name in NETWORKS[1:]:
        shutil.rmtree(made / name)  # as if killed after the first
    assert build(settings)[1] - {"bundle"} == {f"tensorrt-rtx {name}" for name in NETWORKS[1:]}
    plan = made / NETWORKS[0] / ENGINE
    plan.write_bytes(plan.read_bytes()[:-1] + b"x")
    assert build(settings)[1] - {"bundle"} == {f"tensorrt-rtx {NETWORKS[0]}"}
    other = replace(settings, profiles=("batch=1:1:1",))
    assert build(other)[1] - {"bundle"} == {f"tensorrt-rtx {name}" for name in NETWORKS}
    build(settings)


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
    with pytest.raises(EngineMismatch, match="run on NVIDIA GPUs"):
        load(bundle.root, target="tensorrt-rtx", fallback=False)(**inputs)
    with pytest.raises(EngineMismatch, match="run on NVIDIA GPUs"):  # or it would vouch for what it did not run
        verify_bundle(bundle.root, VerifySettings(timesteps=1, target="tensorrt-rtx"))


@pytest.mark.tensorrt
def test_inspect_shows_a_plan(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "inspect", bundle.root, "--engine", "segment-01", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["flavour"], shown["profiles"][0]["batch"]["max"]) == ("tensorrt-rtx", 8)
    assert len(shown["layers"]) > 50
    assert run(monkeypatch, "inspect", bundle.root, "--engine", "segment-01") == 0
    assert "before fusion" in capsys.readouterr().out
    assert run(monkeypatch, "inspect", bundle.root, "--engine", "dense") == 2
    assert "no tensorrt-rtx plan of 'dense'" in capsys.readouterr().err


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["dyexport", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


def test_targets_are_listed_with_what_proves_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "models", "--targets", "--json") == 0
    proof = {each["name"]: each["proof"] for each in json.loads(capsys.readouterr().out)["targets"]}
    assert "untested on a GPU" in proof["tensorrt-rtx"]
    assert "never built" in proof["tensorrt"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"targets": ("tensorrt-rtx",), "token_path": "compact"}, "allocates by data"),
        ({"compute_capabilities": ("8.9",)}, "add --target tensorrt-rtx"),
        ({"profiles": ("batch=1:2:4",)}, "add --target tensorrt-rtx"),
        ({"targets": ("tensorrt-rtx",), "compute_capabilities": ("ada",)}, "'ada' is not one; write 8.9"),
        ({"targets": ("tensorrt-rtx",), "profiles": ("batch=4", "x")}, "MIN:OPT:MAX"),
    ],
)
def test_what_cannot_be_asked_of_tensorrt(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tiny_settings(tmp_path, **values)


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
