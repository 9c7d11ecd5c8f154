"""Bundles that were copied away from their build get TensorRT-RTX plans, the same that a build makes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import onnx
import pytest
import torch

import dyexport
from dyexport.bundle.manifest_file import MANIFEST, manifest_text, read_manifest
from dyexport.bundle.plan_info import INFO, PlanInfo
from dyexport.bundle.reader import Bundle
from dyexport.cli import main
from dyexport.commands.compile import EngineLines, result_line
from dyexport.compilation.api import CompiledTarget, compile_bundle, other_options
from dyexport.compilation.base import BundleNetworks
from dyexport.compilation.jobs import bundle_jobs, engine_stage
from dyexport.compilation.modules import cut
from dyexport.compilation.registry import CompileOptions, get_compiler
from dyexport.compilation.settings import CompileSettings
from dyexport.engines.networks import check_networks
from dyexport.errors import EngineBuildError, StorageError, UsageError
from dyexport.exporters.tensorrt_profiles import TensorrtSettings
from dyexport.runtime.loading import load
from dyexport.runtime.stock import example_inputs
from dyexport.stages.file_records import digest_of
from dyexport.stages.ledger import Ledger, NullListener
from dyexport.stages.locking import locked_output
from dyexport.stages.workers import WorkerPool
from tests.built import built_once
from tests.compilation.bundles import ADA, RTX, compile_for, copy_of, everything_in
from tests.pipeline.tiny import BLOCKS, build, shallow, tamper, tiny_settings
from tests.test_runtime_only import BUILD, without

NETWORKS = ("segment-00", "segment-01", "segment-02", "conditioning")
SLOW = ("dit-digits", "sit-digits", "latte-tiny", "qwen-image-tiny")


def infos(root: Path) -> dict[str, PlanInfo]:
    """Descriptions of the plans of a bundle, without the hashes of the plans."""
    paths = Bundle.open(root).engine_paths(RTX)
    found = {name: PlanInfo.read(path.with_name(INFO)) for name, path in paths.items()}
    return {name: info.model_copy(update={"plan_sha256": ""}) for name, info in found.items()}


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    "model",
    ["flux-tiny", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)],
)
def test_a_copied_bundle_gets_the_plans_that_its_build_made(
    rtx: Any, model: str, shared_folder: Path, tmp_path: Path
) -> None:
    """Of every network, the dense one too, by the same keys; the bundle with plans, and the copy without them."""
    folder = shared_folder / f"plans-{model}"
    built = built_once(
        folder,
        model=shallow(model) if model in BLOCKS else model,
        engines=1 if model in BLOCKS else 2,
        baseline=True,
        targets=(RTX,),
        tensorrt=ADA,
    )
    root = copy_of(built, tmp_path)
    remove_plans(root)
    records = Ledger(folder / "work", NullListener()).records
    compiler = get_compiler(RTX, CompileOptions(tensorrt=ADA), tmp_path / "timings")
    for job in bundle_jobs(Bundle.open(root)):
        assert job.io.inputs == cut(BundleNetworks.of(built), job.network).inputs
        stage = engine_stage(compiler, job, WorkerPool(1), lambda name: lambda done, total: None)
        assert digest_of(stage.inputs) == records[stage.name].inputs
    (result,) = compile_for(root)
    assert result.seconds.keys() == built.engine_paths("onnx").keys()
    assert infos(root) == infos(built.root)
    check_networks(Bundle.open(root), RTX)
    assert everything_in(tmp_path) == sorted(f"bundle/{name}" for name in everything_in(built.root))


def remove_plans(root: Path) -> None:
    """Make a bundle of graphs alone."""
    manifest = read_manifest(root / MANIFEST)
    graphs = tuple(engine for engine in manifest.engines if engine.target == "onnx")
    files = {name: record for name, record in manifest.files.items() if not name.startswith("engines/")}
    text = manifest_text(manifest.model_copy(update={"engines": graphs, "files": files}))
    (root / MANIFEST).write_bytes(text)
    shutil.rmtree(root / "engines")


@pytest.mark.tensorrt
def test_what_is_up_to_date_stays_as_it_is(rtx: Any, root: Path) -> None:
    (first,) = compile_for(root)
    assert first.seconds.keys() == set(NETWORKS)
    before = {name: (root / name).stat() for name in everything_in(root)}
    (second,) = compile_for(root)
    assert (second.seconds, set(second.up_to_date)) == ({}, set(NETWORKS))
    assert {name: (root / name).stat().st_mtime_ns for name in everything_in(root)} == {
        name: status.st_mtime_ns for name, status in before.items()
    }
    assert second.bytes == first.bytes == sum(p.stat().st_size for p in Bundle.open(root).engine_paths(RTX).values())


@pytest.mark.tensorrt
def test_plans_of_another_gpu_or_version_are_replaced(rtx: Any, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_for(root)
    before = Bundle.open(root)
    with monkeypatch.context() as patch:
        patch.setattr(rtx, "__version__", "1.6.0")
        (result,) = compile_for(root, jobs=1)  # in this process
    assert result.seconds.keys() == set(NETWORKS)
    assert {info.version for info in infos(root).values()} == {"1.6.0"}
    announced: list[Any] = []
    blackwell = CompileSettings(targets=(RTX,), tensorrt=TensorrtSettings(compute_capabilities=("12.0",)), jobs=2)
    (result,) = compile_bundle(root, blackwell, NullListener(), lambda *said: announced.append(said))
    assert announced == [(RTX, 4, 2, ("--compute-capability 8.9",))]
    assert result.seconds.keys() == set(NETWORKS)
    assert {info.compute_capabilities for info in infos(root).values()} == {("12.0",)}
    after = Bundle.open(root)
    options = CompileOptions(tensorrt=TensorrtSettings(profiles=("batch=1:1:4",)))
    replaced = other_options(after, get_compiler(RTX, options, root), bundle_jobs(after))
    assert replaced == ("--compute-capability 12.0", "--profile batch=1:2:8")
    assert len(after.manifest.files) == len(before.manifest.files)
    assert {*after.manifest.files, MANIFEST} == {*everything_in(root)}
    assert [name for name in everything_in(root.parent) if not name.startswith("bundle/")] == []


@pytest.mark.tensorrt
def test_a_plan_of_another_graph_is_replaced_and_no_other(rtx: Any, root: Path) -> None:
    compile_for(root)

    def change(content: bytes) -> bytes:
        graph = onnx.load_from_string(content)
        graph.metadata_props.add(key="note", value="changed")
        return graph.SerializeToString()

    tamper(root, "graphs/segment-01.onnx", change)
    with pytest.raises(
        dyexport.BundleError, match=rf"graph of 'segment-01'; .*: dyexport compile {root} --target {RTX}"
    ):
        check_networks(Bundle.open(root), RTX)
    (result,) = compile_for(root)
    assert [*result.seconds] == ["segment-01"]
    check_networks(Bundle.open(root), RTX)


@pytest.mark.tensorrt
@pytest.mark.slow
def test_targets_stand_side_by_side(rtx: Any, tmp_path: Path) -> None:
    root = build(tiny_settings(tmp_path, token_path="dynamic")).root
    first, second = compile_for(root, RTX, "torch")
    assert first.seconds.keys() == second.seconds.keys() == {"segment-00", "conditioning"}
    packages = Bundle.open(root).engine_paths("torch")
    before = {path: path.read_bytes() for path in packages.values()}
    compile_for(root, tensorrt=TensorrtSettings(compute_capabilities=("12.0",)))
    assert {path: path.read_bytes() for path in packages.values()} == before
    inputs = example_inputs(Bundle.open(root).manifest.model, 2, 0.3)
    expected = load(root)(**inputs).sample
    torch.testing.assert_close(load(root, target="torch")(**inputs).sample, expected, atol=1e-5, rtol=0)


@pytest.mark.tensorrt
def test_files_of_the_user_stay(rtx: Any, root: Path) -> None:
    mine = root / "engines" / RTX / "segment-00" / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    compile_for(root)
    assert mine.read_text() == "mine"
    assert set(Bundle.open(root).engine_paths(RTX)) == set(NETWORKS)


def test_two_compilations_of_one_bundle_exclude_each_other(root: Path, rtx: Any) -> None:
    with locked_output(root), pytest.raises(StorageError, match=f"another command is writing {root}"):
        compile_for(root)


def test_a_bundle_in_the_cache_of_the_hub_is_copied_first(rtx: Any, static_tokens: Bundle, tmp_path: Path) -> None:
    repository = tmp_path / "models--own--digits"
    snapshot, blobs = repository / "snapshots" / "1", repository / "blobs"
    blobs.mkdir(parents=True)
    for number, name in enumerate(everything_in(static_tokens.root)):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(static_tokens.root / name, blobs / str(number))
        (snapshot / name).symlink_to(os.path.relpath(blobs / str(number), (snapshot / name).parent))
    Bundle.open(snapshot)
    with pytest.raises(StorageError, match=f"links; copy it with `cp -rL {snapshot} DIR`, then compile DIR"):
        compile_for(snapshot)
    assert everything_in(snapshot) == everything_in(static_tokens.root)


def test_a_read_only_bundle_is_copied_first(rtx: Any, static_tokens: Bundle) -> None:
    """As a user who may read it only: root may write everywhere."""
    place = Path(mkdtemp())  # pytest's folders are closed to other users
    root = copy_of(static_tokens, place)
    compile_for_nobody = f"""
import os, sys
from pathlib import Path
from dyexport.compilation.api import compile_bundle
from dyexport.compilation.settings import CompileSettings
from dyexport.stages.ledger import NullListener
import dyexport.compilation.tensorrt, dyexport.slicing.slicer, dyexport.engines.ort
from dyexport.tensorrt_api import load_api
load_api("{RTX}")
os.chdir({str(root.parent)!r})
if os.getuid() == 0:
    os.setgroups([])
    os.setuid(65534)
compile_bundle(Path("bundle"), CompileSettings(targets=("{RTX}",)), NullListener())
"""
    try:
        for path in (root, place):
            path.chmod(0o555)
        done = subprocess.run([sys.executable, "-c", compile_for_nobody], capture_output=True, text=True)
        assert done.returncode == 1
        assert "Permission denied; copy it with `cp -r " in done.stderr.splitlines()[-1]
        assert everything_in(place) == [f"bundle/{name}" for name in everything_in(static_tokens.root)]
    finally:
        for path in (root, place):
            path.chmod(0o755)
        shutil.rmtree(place)


@pytest.mark.tensorrt
def test_neither_the_build_extra_nor_onnx_runtime_is_needed(rtx: Any, root: Path) -> None:
    command = ("compile", str(root), "--target", RTX, "--compute-capability", "8.9", "--jobs", "1", "--json")
    done = without((*BUILD, "onnxruntime"), *command)
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)["targets"][RTX]
    assert (set(compiled["compiled"]), compiled["up_to_date"]) == (set(NETWORKS), [])
    assert set(Bundle.open(root).engine_paths(RTX)) == set(NETWORKS)
    again = without((*BUILD, "onnxruntime"), *command)
    assert set(json.loads(again.stdout)["targets"][RTX]["up_to_date"]) == set(NETWORKS)


@pytest.mark.tensorrt
def test_the_library_returns_the_bundle_and_reports_progress(rtx: Any, root: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    bundle = dyexport.compile_engines(
        root, RTX, compute_capabilities=["8.9"], profiles=["batch=1:1:2"], progress=lambda *at: reports.append(at)
    )
    assert bundle.engine_paths(RTX).keys() == bundle.engine_paths("onnx").keys()
    assert {info.profiles[0]["batch"].max for info in infos(root).values()} == {2}
    assert {stage for stage, _, _ in reports} == {f"{RTX} {name}" for name in NETWORKS}


def test_a_bundle_whose_tokens_are_allocated_by_data_is_refused(rtx: Any, sit_tiny: Bundle, tmp_path: Path) -> None:
    root = copy_of(sit_tiny, tmp_path)
    with pytest.raises(EngineBuildError, match=r"'compact', .* tensorrt-rtx cannot; .* --token-path dynamic"):
        compile_for(root)
    assert everything_in(tmp_path) == sorted(f"bundle/{name}" for name in everything_in(sit_tiny.root))


def test_nobody_installs_a_builder_in_vain(sit_tiny: Bundle) -> None:
    """Without TensorRT-RTX, the error is what would be refused with it."""
    done = without(("tensorrt_rtx",), "compile", str(sit_tiny.root), "--target", RTX)
    assert (done.returncode, done.stdout) == (1, "")
    assert "--token-path dynamic" in done.stderr
    assert "pip install" not in done.stderr


def test_what_runs_graphs_on_a_gpu_says_so_without_one(root: Path, rtx: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(EngineBuildError, match="--target onnx-rtx compiles on the GPU that runs the engines") as error:
        compile_for(root, "onnx-rtx", tensorrt=TensorrtSettings())
    assert "use --target onnx" not in str(error.value)
    assert "target=" not in str(error.value)
    with pytest.raises(UsageError, match="--device is cpu, and --target onnx-rtx compiles for GPUs"):
        compile_bundle(root, CompileSettings(targets=("onnx-rtx",), device="cpu"), NullListener())
    assert everything_in(root.parent) == [f"bundle/{name}" for name in everything_in(root)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "onnx"), "the ONNX graphs of a bundle are its own"),
        (("--target", "paper"), "unknown target 'paper'; known: "),
        (("--target", RTX, "--device", "cpu"), "--device does nothing for tensorrt-rtx"),
        (("--target", "tensorrt", "--jobs", "2"), "--jobs does nothing for tensorrt"),
        (("--target", "tensorrt", "--compute-capability", "8.9"), "--compute-capability does nothing for tensorrt"),
        (("--target", "torch", "--profile", "batch=1:2:3"), "--profile does nothing for torch"),
        (("--target", "torch", "--stream-weights"), "--stream-weights does nothing for torch"),
        (("--target", "torch", "--device", "tpu"), "unknown device 'tpu'"),
        (("--target", RTX, "--jobs", "0"), "--jobs is 0"),
        (("--target", RTX, "--profile", "batch"), "is not NAME=MIN:OPT:MAX"),
        ((), "--target"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dyexport", "compile", "nowhere", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    captured = capsys.readouterr()
    assert (left.value.code, captured.out) == (2, "")
    (sentence,) = captured.err.strip().splitlines()
    assert message in sentence


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--compute-capability", "9.0", "does not build for compute capability 9.0; it knows 8.0, "),
        ("--compute-capability", "7.5", "does not build for compute capability 7.5; it knows 8.0, "),
        ("--profile", "foo=3", "--profile names 'foo'; sit-tiny has batch, "),
    ],
)
def test_a_wrong_option_is_named_before_what_the_bundle_lacks(
    rtx: Any,
    sit_tiny: Bundle,
    option: str,
    value: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The bundle allocates tokens by data, for which no plan is built."""
    monkeypatch.setattr(sys, "argv", ["dyexport", "compile", str(sit_tiny.root), "--target", RTX, option, value])
    with pytest.raises(SystemExit) as left:
        main()
    captured = capsys.readouterr()
    assert (left.value.code, captured.out) == (2, "")
    (sentence,) = captured.err.strip().splitlines()
    assert message in sentence


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_absent_is_bad_usage(root: Path) -> None:
    settings = CompileSettings(targets=("torch",), device="cuda:1")
    with pytest.raises(UsageError, match="--device is cuda:1, and torch sees no GPU; use --device cpu"):
        compile_bundle(root, settings, NullListener())


def test_lines_say_how_many_engines_are_left(capsys: pytest.CaptureFixture[str]) -> None:
    with EngineLines() as lines:
        assert lines.stopped() == "stopped; no engine was compiled yet; repeat the command to go on"
        lines.announce(RTX, 2, 1, ())
        lines.finished(f"{RTX} segment-00", 1.25, reused=True)
        assert lines.stopped() == "stopped; 1 of 2 engines are kept; repeat the command to go on"
        lines.finished(f"{RTX} conditioning", 1.25, reused=False)
        lines.announce("torch", 1, 1, ())
        assert lines.stopped() == "stopped; 0 of 1 engine are kept; repeat the command to go on"
    assert capsys.readouterr().err.splitlines() == [
        f"{RTX}: compiling 2 engines, 1 at a time",
        f"{RTX} segment-00: up to date, 1 left",
        f"{RTX} conditioning: done in 1.2 s",
        "torch: compiling 1 engine, 1 at a time",
    ]


def test_the_time_of_a_target_is_that_of_the_clock() -> None:
    seconds = {"segment-00": 3.0, "conditioning": 3.1}
    result = CompiledTarget(target=RTX, seconds=seconds, elapsed=3.4, up_to_date=(), bytes=0)
    assert result_line(result) == "2 engines compiled in 3.4 s"


def test_settings_without_a_target_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown target ''"):
        CompileSettings(targets=())


@pytest.mark.tensorrt
def test_a_build_keeps_what_was_compiled_for_its_graphs(rtx: Any, tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, engines=1, token_path="dynamic")
    root = build(settings).root
    compile_for(root)
    plans = {place: place.read_bytes() for place in root.rglob("*.plan")}
    assert len(plans) == 2
    compiled = Bundle.open(root).manifest
    other = compiled.model_copy(update={"metrics": {**compiled.metrics, "loss": 1.0}})
    for manifest in (compiled, other):  # the bundle is as it was; it is to be replaced
        (root / MANIFEST).write_bytes(manifest_text(manifest))
        assert build(settings).manifest == compiled
        assert {place: place.read_bytes() for place in root.rglob("*.plan")} == plans
    plan = next(iter(plans))
    plan.write_bytes(plan.read_bytes()[:-1] + b"!")
    assert {engine.target for engine in build(settings).manifest.engines} == {"onnx"}, "not what is damaged"
    assert not list(root.rglob("*.plan"))
    compile_for(root)
    build(replace(settings, engines=2))
    assert not list(root.rglob("*.plan"))
