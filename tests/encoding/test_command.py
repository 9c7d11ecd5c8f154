"""From folders of pictures to a bundle: ``encode`` and ``build``, and ``build`` alone."""

from __future__ import annotations

import json
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
from dyexport.models.random_weights import random_backbone
from dyexport.presets import get_preset
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
    for line in ("6 of shape (4, 2, 2)", "6 of shape (4, 2, 2) (1 of 1 shards were there)"):
        done = CliRunner().invoke(app, [*map(str, words), "-o", str(tmp_path / "latents")])
        assert line in " ".join(done.stdout.split())
