"""From folders of pictures to a bundle: ``encode`` and ``build``, and ``build`` alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dyexport.backbones.base import Preset
from dyexport.checkpoints.static import save_static
from dyexport.cli import app
from dyexport.digits import load_digits
from dyexport.errors import DataError, DyexportWarning, UsageError
from dyexport.models.random_weights import random_backbone
from dyexport.pipeline.build import make_static_model, opened
from dyexport.pipeline.settings import BuildSettings
from dyexport.presets import get_preset
from dyexport.stages.ledger import NullListener
from dyexport.verification.verify import verify
from tests.encoding.folders import class_folder
from tests.pipeline.tiny_pipeline import small_vae
from tests.test_docs import JSON_KEYS

MODEL: Preset = replace(
    get_preset("dit-digits"),
    name="dit-encoded",
    in_channels=4,
    sample_size=4,
    patch_size=2,
    layers=2,
    hidden_size=48,
    heads=8,
    pixel_space=False,
)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of handwritten digits in a folder for each class."""
    root, digits = tmp_path_factory.mktemp("digits"), load_digits("train")
    for number, (pixels, label) in enumerate(zip(digits.pictures[:100], digits.labels[:100], strict=True)):
        folder = root / str(label)
        folder.mkdir(exist_ok=True)
        Image.fromarray((pixels[0] * 255).round().astype(np.uint8)).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DiT with its VAE."""
    root = tmp_path_factory.mktemp("pipeline") / "dit-encoded"
    save_static(random_backbone(MODEL), root / "transformer")
    small_vae().save_pretrained(root / "vae")
    return root


def run(*words: str | Path) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*map(str, words), "--json"], catch_exceptions=False)
    return json.loads(done.stdout)


def test_two_commands_make_a_bundle_of_pictures(digits: Path, pipeline: Path, tmp_path: Path) -> None:
    encoded = run("encode", digits, "--pipeline", pipeline, "-o", tmp_path / "latents", "--flip")
    assert set(encoded) == JSON_KEYS["encode"]
    assert (encoded["pictures"], encoded["samples"], encoded["shape"]) == (100, 200, [4, 4, 4])
    assert encoded["classes"] == [str(label) for label in range(10)]
    build = ["build", "--checkpoint", pipeline, "--data", tmp_path / "latents", "--budget", "0.5", "-o", tmp_path / "b"]
    built = run(*build, "--finetune-steps", "1", "-k", "1", "--no-baseline")
    assert built["recipe"]["routers"] == "trained"
    assert verify(built["bundle"]).passed


def test_encoding_prints_what_it_made(tmp_path: Path) -> None:
    small_vae().save_pretrained(tmp_path / "vae")
    words = ["encode", class_folder(tmp_path / "pictures"), "--vae", tmp_path / "vae", "--size", 16]
    for line in ("6 of shape (4, 2, 2)", "6 of shape (4, 2, 2) (6 were there)"):
        with pytest.warns(DyexportWarning, match=r"the latents in .* have a standard deviation of 0\."):
            done = CliRunner().invoke(app, [*map(str, words), "-o", str(tmp_path / "latents")])
        printed = " ".join(done.stdout.split())
        assert line in printed
        assert "pictures 6, cropped to 16 x 16 px" in printed
        assert f"VAE{tmp_path / 'vae'}" in "".join(done.stdout.split())


def stages_of(built: dict[str, Any]) -> dict[str, str]:
    return {name: stage["status"] for name, stage in built["stages"].items()}


def test_a_build_encodes_pictures_itself_and_once(digits: Path, pipeline: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(digits, tmp_path / "pictures")
    build = ["finetune", "--checkpoint", pipeline, "--data", folder, "--budget", "0.5", "--finetune-steps", "0"]
    work = tmp_path / "work"
    done = CliRunner().invoke(app, [*map(str, build), "--work", str(work), "--json"], catch_exceptions=False)
    assert f"data {folder}, encoded by the VAE in {pipeline}/vae; stored" in done.stderr
    first = json.loads(done.stdout)
    assert stages_of(first)["encoded"] == "done"
    assert stages_of(run(*build, "--work", work))["encoded"] == "reused"
    assert not (work / "training").exists()
    run("encode", folder, "--pipeline", pipeline, "-o", tmp_path / "latents")
    for name in ("latents-000000.safetensors", "encoding.json"):
        assert (work / "encoded" / name).read_bytes() == (tmp_path / "latents" / name).read_bytes()
    next(folder.rglob("*.png")).unlink()
    again = run("finetune", "--work", work)
    assert (stages_of(again)["encoded"], stages_of(again)["static"]) == ("done", "reused")


class StopsAt(NullListener):
    """Presses Ctrl-C where encoding has come so far, and remembers where it began."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.reports: list[int] = []

    def advanced(self, stage: str, done: int, total: int, detail: str = "") -> None:
        if stage == "encoded":
            self.reports.append(done)
            if done >= self.samples:
                raise KeyboardInterrupt


def settings_of(pipeline: Path, folder: Path, place: Path) -> BuildSettings:
    """Settings of a build from a folder of pictures that trains nothing."""
    return BuildSettings(
        checkpoint=str(pipeline),
        budget=0.5,
        out=place / "out",
        work=place / "work",
        data=str(folder),
        finetune_steps=0,
    )


def test_an_interrupted_build_keeps_the_shards_that_it_has(pipeline: Path, tmp_path: Path) -> None:
    folder = class_folder(tmp_path / "pictures", count=30, classes=tuple("0123456789"))
    settings = settings_of(pipeline, folder, tmp_path)
    begins = []
    for samples in (256, 300):
        listener = StopsAt(samples)
        with pytest.raises(KeyboardInterrupt), opened(settings, listener) as run_:
            make_static_model(run_)
        begins.append(listener.reports[:2])
    assert begins[0][1] < 256
    assert begins[1] == [256, 256]


def test_a_build_encodes_what_it_has_not_encoded_before(pipeline: Path, tmp_path: Path) -> None:
    folder = class_folder(tmp_path / "pictures", count=30, classes=tuple("0123456789"))
    settings = settings_of(pipeline, folder, tmp_path)

    def reports() -> list[int]:
        """Make the static model, and return how far encoding had come at each report."""
        listener = StopsAt(1000)
        with opened(settings, listener) as run_:
            make_static_model(run_)
        return listener.reports

    assert len(reports()) > 300  # one for each picture
    (folder / "9" / "29.png").unlink()
    assert reports() == [256, 299]  # one for each shard, of rows that are copied
    shard = tmp_path / "work" / "encoded" / "latents-000001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert reports()[:3] == [256, 256, 257]
    assert shard.read_bytes() == whole


def test_what_a_build_cannot_encode_is_refused_early(digits: Path, pipeline: Path, tmp_path: Path) -> None:
    settings = {"model": MODEL, "budget": 0.5, "out": tmp_path / "out", "work": tmp_path / "work", "data": str(digits)}
    with pytest.raises(UsageError, match="encoding pictures takes a VAE; give --vae"):
        BuildSettings(**settings, checkpoint=str(pipeline / "transformer" / "diffusion_pytorch_model.safetensors"))
    shutil.copytree(pipeline, tmp_path / "vae-nearby")
    (tmp_path / "vae-nearby" / "transformer").rename(tmp_path / "vae-nearby" / "model")
    with pytest.raises(UsageError, match="encoding pictures takes a VAE; give --vae"):
        BuildSettings(**settings, checkpoint=str(tmp_path / "vae-nearby" / "model"))
    BuildSettings(**settings, checkpoint=str(pipeline / "transformer"))
    few = class_folder(tmp_path / "pictures")
    with pytest.raises(DataError, match=r"has 2 classes \(cats, dogs\) and dit-encoded 10"):
        BuildSettings(**{**settings, "data": str(few)}, checkpoint=str(pipeline))
    with pytest.raises(UsageError, match="dit-digits samples pixels, which no VAE decodes"):
        BuildSettings(**{**settings, "model": "dit-digits", "data": "digits"}, vae=str(pipeline))
    with pytest.raises(DataError, match="latte-tiny makes videos"):
        BuildSettings(**{**settings, "model": "latte-tiny"}, random_weights=True, vae=str(pipeline))
