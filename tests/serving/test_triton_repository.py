"""A bundle as a model of a Triton repository: whole, linked, and refused where it cannot be served."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest
import torch

from dyexport.bundle.manifest import EngineRecord
from dyexport.bundle.manifest_file import WEIGHTS, WIDTHS
from dyexport.bundle.reader import Bundle
from dyexport.cli import main
from dyexport.errors import BundleError, EngineMismatchError, UsageError
from dyexport.runtime.loading import load
from dyexport.serving.config import ServedModelConfig
from dyexport.serving.triton_repository import Deployment, deploy
from tests.manifests import forge
from tests.pipeline.tiny import hashes
from tests.runtime.bundles import TinyBundle, make_inputs, write_bundle, write_manifest
from tests.runtime.test_opening import in_hub_cache


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    return write_bundle(tmp_path_factory.mktemp("served") / "bundle")


def deployed(bundle: TinyBundle, repository: Path, **values: Any) -> Path:
    return deploy(Deployment(bundle=bundle.root, repository=repository, **{"name": "digits", **values}))


def test_a_model_is_the_bundle_and_what_serves_it(tiny: TinyBundle, tmp_path: Path) -> None:
    model = deployed(tiny, tmp_path / "models")
    assert hashes(model / "1" / "bundle") == hashes(tiny.root)
    Bundle.open(model / "1" / "bundle")
    assert "dyexport.serving.triton_model" in (model / "1" / "model.py").read_text()
    config = (model / "config.pbtxt").read_text()
    assert 'input [ { name: "label" data_type: TYPE_INT64 dims: [ 1 ] } ]' in config
    assert 'output [ { name: "image" data_type: TYPE_UINT8 dims: [ -1, -1, -1 ] } ]' in config
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["digits"]


def test_a_bundle_in_the_hubs_cache_is_deployed_whole(tiny: TinyBundle, tmp_path: Path) -> None:
    """Its files have other names there; a server needs no cache."""
    cached = in_hub_cache(tiny.root, tmp_path / "hub")
    model = deploy(Deployment(bundle=cached, repository=tmp_path / "models", name="digits"))
    shutil.rmtree(tmp_path / "hub")
    assert hashes(model / "1/bundle") == hashes(tiny.root)
    inputs = make_inputs(2)
    assert torch.equal(load(model / "1/bundle")(**inputs).sample, load(tiny.root)(**inputs).sample)


def test_a_model_without_its_weights_is_not_deployed(tiny: TinyBundle, tmp_path: Path) -> None:
    """The manifest is whole by its hash, and names all but the file that every graph refers to."""
    copy = Path(shutil.copytree(tiny.root, tmp_path / "copy"))
    forge(copy, lambda manifest: manifest["files"].pop(WEIGHTS))
    with pytest.raises(BundleError, match=f"names no {WEIGHTS}"):
        deploy(Deployment(bundle=copy, repository=tmp_path / "models", name="digits"))
    forge(copy, lambda manifest: manifest["files"].update({WEIGHTS: manifest["files"][WIDTHS]}))
    shutil.copy(copy / WIDTHS, copy / WEIGHTS)
    with pytest.raises(BundleError, match="has weights up to byte"):
        deploy(Deployment(bundle=copy, repository=tmp_path / "models", name="digits"))
    assert not (tmp_path / "models").exists()


def test_its_files_are_links_to_the_bundles(tiny: TinyBundle, tmp_path: Path) -> None:
    model = deployed(tiny, tmp_path / "models")
    assert (model / "1/bundle/graphs/weights.bin").samefile(tiny.root / "graphs/weights.bin")


def test_parameters_come_back_from_the_configuration(tiny: TinyBundle, tmp_path: Path) -> None:
    model = deployed(tiny, tmp_path, scheduler="dpm++", memory="1GiB", instances=2, max_steps=7, max_batch=3)
    config = (model / "config.pbtxt").read_text()
    found = re.findall(r'parameters \{ key: "(\w+)" value \{ string_value: "([^"]*)" \} \}', config)
    served = ServedModelConfig.of_config({"parameters": {name: {"string_value": value} for name, value in found}})
    assert served == ServedModelConfig(scheduler="dpm++", memory="1GiB", share_weights=True, max_steps=7)
    assert "max_batch_size: 3" in config
    assert "instance_group [ { count: 2 } ]" in config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", "many"),
        ("max_steps", "0"),
        ("max_steps", "100000000000000000000"),
        ("max_prompt", "0"),
        ("share_weights", "x"),
        ("color", "red"),
    ],
)
def test_an_edited_parameter_that_is_wrong_is_named(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=rf"parameters of config.pbtxt: {name}: .*; it is '{value}'"):
        ServedModelConfig.of_config({"parameters": {name: {"string_value": value}}})


def test_deploying_again_replaces_the_model(tiny: TinyBundle, tmp_path: Path) -> None:
    deployed(tiny, tmp_path, max_steps=7)
    (tmp_path / ".partial-digits").mkdir()  # of a run that was killed
    model = deployed(tiny, tmp_path, max_steps=8)
    assert 'string_value: "8"' in (model / "config.pbtxt").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_what_is_not_finished_looks_like_no_model(tiny: TinyBundle, tmp_path: Path) -> None:
    """Triton takes every folder with a version for a model, whatever its name, and a server may poll at any moment."""
    deployment = Deployment(bundle=tiny.root, repository=tmp_path, name="digits")
    seen: list[list[Path]] = []
    deploy(deployment, lambda done, total: seen.append(list(tmp_path.glob("*/1"))))
    assert len(seen) > 2
    assert not any(seen)
    deploy(deployment, lambda done, total: seen.append(list(tmp_path.glob("*/1"))))
    assert seen[-1] == [tmp_path / "digits" / "1"]
    assert sorted(path.name for path in (tmp_path / "digits").iterdir()) == ["1", "config.pbtxt"]


def test_another_model_of_that_name_is_left_alone(tiny: TinyBundle, tmp_path: Path) -> None:
    (tmp_path / "digits" / "1").mkdir(parents=True)
    (tmp_path / "digits" / "1" / "model.py").write_text("print()")
    with pytest.raises(UsageError, match="was not written by dyexport; choose another --name"):
        deployed(tiny, tmp_path)
    assert (tmp_path / "digits" / "1" / "model.py").read_text() == "print()"


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"name": "../x"}, UsageError, "--name is '../x'"),
        ({"name": ""}, UsageError, "--name is ''"),
        ({"instances": 0}, UsageError, "--instances is 0"),
        ({"max_batch": 0}, UsageError, "--max-batch is 0"),
        ({"name": "x" * 300}, UsageError, "--name is"),
        ({"instances": 10**20}, UsageError, f"--instances is {10**20}; give a whole number from 1 to"),
        ({"instances": 1.5}, UsageError, "--instances is 1.5"),
        ({"max_batch": 10**20}, UsageError, f"--max-batch is {10**20}; give a whole number from 1 to"),
        ({"max_steps": 10**20}, UsageError, f"--max-steps is {10**20}; give a whole number from 1 to 1000"),
        ({"max_pixels": 10**20}, UsageError, f"--max-pixels is {10**20}"),
        ({"max_prompt": 0}, UsageError, "--max-prompt is 0"),
        ({"max_prompt": 10**20}, UsageError, f"--max-prompt is {10**20}"),
        ({"memory": "1"}, UsageError, "memory of 1 bytes holds no engine"),
        ({"memory": "1", "instances": 2}, UsageError, "memory of 1 bytes holds no engine"),
        ({"memory": "9" * 400}, UsageError, "not a size"),
        ({"pipeline": "x"}, UsageError, "has no pipeline; give --vae"),
        ({"vae": "x"}, UsageError, "samples pixels; leave --vae out"),
        ({"scheduler": "euler"}, UsageError, "use ddim or dpm"),
        ({"memory": "much"}, UsageError, "much"),
        ({"target": "tensorrt-rtx"}, EngineMismatchError, "no 'tensorrt-rtx' engines"),
        ({"target": "paper"}, UsageError, "paper"),
    ],
)
def test_what_cannot_be_served_is_refused(
    tiny: TinyBundle, tmp_path: Path, values: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        deployed(tiny, tmp_path / "models", **values)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("blocks", "side"), [(4, 1024), (2, 256), (None, 1024)])
def test_a_server_that_may_not_draw_its_own_size_is_refused(tmp_path: Path, blocks: int | None, side: int) -> None:
    bundle = prompted(tmp_path / "bundle", guidance=True)
    pipeline = tmp_path / "pipeline"
    (pipeline / "vae").mkdir(parents=True)
    if blocks is not None:
        (pipeline / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [8] * blocks}))
    given = {"name": "flux", "pipeline": str(pipeline)}
    with pytest.raises(UsageError, match=f"samples {side} x {side} by default; give at least {side**2}"):
        deployed(bundle, tmp_path / "models", max_pixels=side**2 - 1, **given)
    assert not (tmp_path / "models").exists()
    assert deployed(bundle, tmp_path / "models", max_pixels=side**2, **given).is_dir()


def prompted(root: Path, *, guidance: bool) -> TinyBundle:
    """A bundle as one of FLUX looks to what reads its manifest alone."""
    bundle = write_bundle(root, objective="flow", pixels=False)
    names = sorted(path.stem for path in (root / "graphs").glob("*.onnx"))
    engines = [EngineRecord(target="onnx", network=name, path=f"graphs/{name}.onnx") for name in names]
    changes = {"name": "flux", "backbone": "flux", "classes": 0, "config": {"guidance_embeds": guidance}}
    write_manifest(root, bundle.spec.model_copy(update=changes), bundle.plan, engines)
    return bundle


@pytest.mark.parametrize("guidance", [True, False])
def test_a_request_holds_guidance_where_it_changes_something(tmp_path: Path, guidance: bool) -> None:
    model = deployed(prompted(tmp_path / "bundle", guidance=guidance), tmp_path / "models", pipeline="some/hub-id")
    assert ('name: "guidance"' in (model / "config.pbtxt").read_text()) == guidance


def test_python_writes_no_bytecode_into_a_version(
    tiny: TinyBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would look like another model to a server that polls."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    version = deployed(tiny, tmp_path) / "1"
    before = {path: path.stat().st_mtime_ns for path in (version, *version.rglob("*"))}
    code = SourceFileLoader("1.model", str(version / "model.py")).get_code("1.model")
    assert code is not None
    assert {path: path.stat().st_mtime_ns for path in (version, *version.rglob("*"))} == before


def test_a_damaged_bundle_is_refused(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    content = bytearray((bundle.root / "graphs/weights.bin").read_bytes())
    content[0] ^= 1
    (bundle.root / "graphs/weights.bin").write_bytes(content)
    with pytest.raises(BundleError, match="does not match its hash"):
        deployed(bundle, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_the_command(
    tiny: TinyBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dyexport", "deploy", "triton", str(tiny.root), str(tmp_path), "--json"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 0
    payload = json.loads(capsys.readouterr().out)
    assert payload == {"model": "bundle", "path": f"{tmp_path}/bundle", "config": f"{tmp_path}/bundle/config.pbtxt"}
    assert (tmp_path / "bundle" / "config.pbtxt").is_file()


def limit_file_size() -> None:
    """A disk with no room, to anyone who is not root; links take none."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


@pytest.mark.build
def test_a_full_disk_leaves_what_was_there(tiny: TinyBundle, tmp_path: Path) -> None:
    before = hashes(deployed(tiny, tmp_path, name="bundle"))
    command = [sys.executable, "-m", "dyexport", "deploy", "triton", str(tiny.root), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit_file_size)
    assert done.returncode == 1
    assert "cannot write" in done.stderr
    assert done.stderr.count("\n") == 1
    assert hashes(tmp_path / "bundle") == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
