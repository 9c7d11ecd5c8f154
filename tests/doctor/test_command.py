"""``dyexport doctor`` as a whole: on this machine, on broken installations, and with bundles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dyexport.bundle.manifest import CONDITIONING, EngineRecord
from dyexport.bundle.manifest_file import MANIFEST, RANGES, seal
from dyexport.bundle.plan import TokenPath, segment_name
from dyexport.bundle.plan_info import ENGINE, INFO, PlanInfo
from dyexport.bundle.reader import Bundle
from dyexport.commands.doctor import MOST_HASHED
from dyexport.digests import sha256_of
from dyexport.doctor.bundles import EngineFit, fit_bundle
from dyexport.doctor.probing import Findings
from dyexport.doctor.targets import judge_all
from tests.doctor.machines import machine
from tests.runtime.bundles import TinyBundle, write_bundle, write_manifest

ROOT = Path(__file__).parents[2]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def doctor(*arguments: str, site: Path | None = None, cwd: Path) -> tuple[int, dict[str, Any]]:
    """Run the command in a separate process; packages in ``site`` come before those installed."""
    paths = [str(ROOT)] if site is None else [str(site), str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "dyexport", "doctor", "--json", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


def printed(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command for a person to read."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "dyexport", "doctor", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def broken(site: Path, *packages: str) -> Path:
    """Packages that are installed and cannot be loaded."""
    for name in packages:
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").write_text(f"raise OSError('lib{name}.so.13: cannot open shared object file')")
    return site


def with_plans(root: Path, capability: str = "8.9") -> Bundle:
    """A bundle with files of TensorRT-RTX plans; nothing reads the plans themselves."""
    tiny = write_bundle(root, segments=2)
    engines = list(Bundle.open(root).manifest.engines)
    for network in (segment_name(0), segment_name(1), CONDITIONING):
        folder = root / "engines" / "tensorrt-rtx" / network
        folder.mkdir(parents=True)
        (folder / ENGINE).write_bytes(b"plan" * 250)
        write_info(folder, capability)
        engines.append(
            EngineRecord(target="tensorrt-rtx", network=network, path=str((folder / ENGINE).relative_to(root)))
        )
    write_manifest(root, tiny.spec, tiny.plan, engines)
    return Bundle.open(root)


def write_info(folder: Path, capability: str) -> None:
    info = PlanInfo(
        flavour="tensorrt-rtx",
        version="1.0",
        compute_capabilities=(capability,),
        precision="fp32",
        profiles=(),
        inputs=(),
        outputs=(),
        layers=(),
        graph_sha256="0" * 64,
        plan_sha256=sha256_of(folder / ENGINE),
    )
    (folder / INFO).write_text(info.model_dump_json())


def fits_of(bundle: Bundle, path: Path, tmp_path: Path, *gpus: str) -> dict[str, EngineFit]:
    described = machine(tmp_path / "no-files", *gpus)
    return {fit.target: fit for fit in fit_bundle(bundle, path, judge_all(described), described, Findings())}


def test_this_machine(tmp_path: Path) -> None:
    code, payload = doctor(cwd=tmp_path)
    assert (code, payload["passed"], payload["bundle"]) == (0, True, None)
    assert {each["target"]: each["device"] for each in payload["targets"]}["onnx"] in ("cpu", "cuda")
    assert payload["host"]["packages"]["torch"] == torch.__version__
    assert payload["problems"] == {}


def test_a_broken_onnxruntime_is_a_finding(tmp_path: Path) -> None:
    code, payload = doctor(site=broken(tmp_path / "site", "onnxruntime", "tensorrt"), cwd=tmp_path)
    devices = {each["target"]: each["device"] for each in payload["targets"]}
    assert devices["onnx"] is None
    assert code == (0 if any(devices.values()) else 1)
    assert payload["accelerators"]["providers"] is None
    assert "libonnxruntime.so.13" in payload["problems"]["onnxruntime"]
    (need,) = next(each["needs"] for each in payload["targets"] if each["target"] == "onnx")
    assert "libonnxruntime.so.13" in need["what"]


def test_without_a_working_torch_nothing_runs(tmp_path: Path) -> None:
    code, payload = doctor(site=broken(tmp_path / "site", "torch"), cwd=tmp_path)
    assert (code, payload["passed"]) == (1, False)
    assert {each["device"] for each in payload["targets"]} == {None}
    assert all("libtorch.so.13" in each["needs"][0]["what"] for each in payload["targets"])
    assert "libtorch.so.13" in payload["problems"]["torch"]
    assert payload["host"]["memory"] > 0


def test_engines_of_a_bundle_that_run(tmp_path: Path) -> None:
    tiny: TinyBundle = write_bundle(tmp_path / "bundle", segments=2)
    code, payload = doctor("bundle", cwd=tmp_path)
    onnx = next(fit for fit in payload["bundle"] if fit["target"] == "onnx")
    assert code == 0
    assert (onnx["engines"], onnx["fitting"], onnx["compile"], onnx["fits_in_memory"]) == (4, 4, None, True)
    assert onnx["engines"] == len(Bundle.open(tiny.root).engine_paths("onnx")), (
        "as compile counts: the dense network, too"
    )
    assert payload["hashed"] is True
    store = (tiny.root / "graphs" / "weights.bin").stat().st_size
    assert 0 < onnx["least_bytes"] < onnx["weight_bytes"] <= 3 * store


def test_no_bundle_is_an_error(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "dyexport", "doctor", "nowhere", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "nowhere does not exist; give the directory of a bundle" in done.stderr


def test_a_flipped_byte_is_found(tmp_path: Path) -> None:
    root = write_bundle(tmp_path / "bundle", segments=2).root
    store = root / "graphs" / "weights.bin"
    content = bytearray(store.read_bytes())
    content[len(content) // 2] ^= 1
    store.write_bytes(content)
    done = printed("bundle", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "weights.bin does not match its hash; copy the bundle again, or build it again" in done.stderr


def test_contents_of_large_bundles_are_not_checked(tmp_path: Path) -> None:
    """A sparse file of another hash, in a bundle that would take long to read."""
    root = write_bundle(tmp_path / "bundle", segments=2).root
    (root / "large").touch()
    os.truncate(root / "large", MOST_HASHED + 1)
    content = json.loads((root / MANIFEST).read_text())
    del content["sha256"]
    content["files"]["large"] = {"sha256": "0" * 64, "bytes": MOST_HASHED + 1}
    (root / MANIFEST).write_bytes(seal(json.dumps(content, indent=1)))
    done = printed("bundle", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "contents of its files were not checked" in done.stdout
    assert "\n      dyexport verify bundle\n" in done.stdout
    assert doctor("bundle", cwd=tmp_path)[1]["hashed"] is False


def test_tables_have_titles(tmp_path: Path) -> None:
    lines = printed(cwd=tmp_path).stdout.splitlines()
    titles = ("Machine", "Accelerators, as torch and ONNX Runtime see them", "Targets")
    assert [line for line in lines if line and not line.startswith(" ")] == list(titles)


@pytest.mark.parametrize(
    ("target", "verb"), [("tensorrt-rtx", "compiled"), ("torch-tensorrt", "compiled"), ("onnx-rtx", "run")]
)
def test_targets_that_cannot_skip_tokens_as_the_bundle_does(target: str, verb: str, tmp_path: Path) -> None:
    fits: dict[TokenPath, EngineFit] = {}
    paths: tuple[TokenPath, ...] = ("compact", "dynamic")
    for path in paths:
        root = write_bundle(tmp_path / path, segments=2, path=path, capacity=2).root
        fits[path] = fits_of(Bundle.open(root), root, tmp_path)[target]
    cure = "its engines skip tokens on the path 'compact'; build it with --token-path dynamic"
    assert fits["compact"].reason == f"cannot be {verb}: {cure}"
    assert (fits["compact"].fitting, fits["compact"].compile) == (0, None)
    assert fits["dynamic"].reason is not None
    assert "compact" not in fits["dynamic"].reason


@without_gpu
@pytest.mark.tensorrt
def test_plans_can_be_compiled_where_they_do_not_run(rtx: Any, tmp_path: Path) -> None:
    write_bundle(tmp_path / "my bundle", segments=2)
    _, payload = doctor("my bundle", cwd=tmp_path)
    plans = next(fit for fit in payload["bundle"] if fit["target"] == "tensorrt-rtx")
    assert (plans["engines"], plans["fitting"], plans["device"]) == (0, 0, None)
    assert plans["reason"] == "does not run here; can be compiled here"
    assert plans["compile"] == "dyexport compile 'my bundle' --target tensorrt-rtx"
    assert next(each for each in payload["targets"] if each["target"] == "tensorrt-rtx")["compiles"] is True


@without_gpu
def test_plans_do_not_fit_a_machine_without_a_gpu(tmp_path: Path) -> None:
    fits = fits_of(with_plans(tmp_path / "b"), tmp_path / "b", tmp_path)
    assert fits["onnx"].runs
    plans = fits["tensorrt-rtx"]
    assert (plans.engines, plans.fitting, plans.compile) == (3, 0, None)
    assert plans.reason == "tensorrt-rtx does not run here"


@without_gpu
@pytest.mark.tensorrt
def test_compile_is_the_cure_where_the_target_runs(rtx: Any, tmp_path: Path) -> None:
    """The machine is described as one with a GPU; torch sees none, so that the plans do not fit."""
    folder = tmp_path / "my bundle"
    plans = fits_of(with_plans(folder), folder, tmp_path, "8.9")["tensorrt-rtx"]
    assert (plans.device, plans.fitting) == ("cuda", 0)
    assert plans.reason is not None
    assert plans.compile == f"dyexport compile '{folder}' --target tensorrt-rtx"
    assert (plans.weight_bytes, plans.least_bytes) == (3000, 2000)


def test_bf16_graphs_do_not_run_on_a_cpu(tmp_path: Path) -> None:
    root = tmp_path / "bundle"
    tiny = write_bundle(root, segments=2)
    spec = tiny.spec.model_copy(update={"precision": "bf16"})
    engines = list(Bundle.open(root).manifest.engines)
    write_manifest(root, spec, tiny.plan, engines)
    onnx = fits_of(Bundle.open(root), root, tmp_path)["onnx"]
    assert not onnx.runs
    assert onnx.reason == "ONNX Runtime has no CPU kernels for bf16"


def test_memory_that_is_too_small() -> None:
    sizes = {"target": "onnx", "device": "cpu", "engines": 3, "fitting": 3, "reason": None, "compile": None}
    assert EngineFit(**sizes, weight_bytes=9, least_bytes=5, free_bytes=5).fits_in_memory is True
    assert EngineFit(**sizes, weight_bytes=9, least_bytes=5, free_bytes=4).fits_in_memory is False
    assert EngineFit(**sizes, weight_bytes=9, least_bytes=5, free_bytes=None).fits_in_memory is None


def test_eight_bits_cannot_be_compiled_from_modules(tmp_path: Path) -> None:
    root = tmp_path / "bundle"
    tiny = write_bundle(root, segments=2)
    (root / RANGES).write_text("{}")
    spec = tiny.spec.model_copy(update={"quantization": "int8"})
    write_manifest(root, spec, tiny.plan, list(Bundle.open(root).manifest.engines))
    fits = fits_of(Bundle.open(root), root, tmp_path)
    for target in ("torch", "torch-tensorrt"):
        assert (
            fits[target].reason == "cannot be compiled: its linear layers are in int8, which only its ONNX graphs have"
        )
        assert fits[target].compile is None
    assert fits["onnx"].runs
