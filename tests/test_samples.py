"""``dyexport.sample``, from labels: what the command line draws, as tensors and as images."""

from __future__ import annotations

import doctest
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import dyexport
from dyexport.bundle.reader import Bundle
from dyexport.cli import main
from dyexport.errors import UsageError
from dyexport.samples import Samples
from tests.runtime.bundles import TinyBundle, write_bundle


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    """A bundle of a model that samples latents."""
    return write_bundle(tmp_path_factory.mktemp("latents") / "bundle", objective="flow", pixels=False)


def test_the_example_of_its_docstring_runs(
    sit_tiny: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sit-digits-0.5").symlink_to(sit_tiny.root)
    (example,) = doctest.DocTestFinder(recurse=False).find(dyexport.sample, globs={"dyexport": dyexport})
    assert len(example.examples) == 3
    assert doctest.DocTestRunner().run(example).failed == 0, capsys.readouterr().out
    assert Image.open("digits.png").size[0] > 100


def test_samples_are_shown_by_their_shape() -> None:
    samples = Samples(values=torch.zeros(2, 1, 8, 8), pixels=True, settings={"labels": [3, 7]})
    assert repr(samples) == "Samples(pixels (2, 1, 8, 8), {'labels': [3, 7]})"


def test_a_path_a_bundle_and_what_load_returns_are_the_same(sit_tiny: Bundle) -> None:
    loaded = dyexport.load(sit_tiny.root)
    first, *others = (
        dyexport.sample(source, labels=[1, 2], steps=2, seed=3).values
        for source in (loaded, sit_tiny, sit_tiny.root, str(sit_tiny.root), loaded)  # which stays open
    )
    for values in others:
        torch.testing.assert_close(values, first, rtol=0, atol=0)
    loaded.close()


def test_the_command_line_samples_the_same_with_the_same_defaults(
    sit_tiny: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = dyexport.sample(sit_tiny.root)
    samples.save(tmp_path / "python.png")
    arguments = ["sample", str(sit_tiny.root), "-o", str(tmp_path / "command.png"), "--json"]
    monkeypatch.setattr(sys, "argv", ["dyexport", *arguments])
    with pytest.raises(SystemExit):
        main()
    said = json.loads(capsys.readouterr().out)
    assert {**samples.settings, "path": str(tmp_path / "command.png")} == said
    assert said["scheduler"] == "euler"
    assert (tmp_path / "python.png").read_bytes() == (tmp_path / "command.png").read_bytes()


def test_progress_counts_steps(sit_tiny: Bundle) -> None:
    steps: list[tuple[int, int]] = []
    dyexport.sample(sit_tiny.root, labels=[1], steps=3, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_images_are_the_values_in_8_bits(sit_tiny: Bundle) -> None:
    samples = dyexport.sample(sit_tiny.root, labels=[1, 2], steps=2)
    images = samples.images()
    assert [(image.mode, image.size) for image in images] == [("L", (8, 8))] * 2
    pixels = np.stack([np.asarray(image) for image in images]) / 255  # (B, H, W)
    np.testing.assert_allclose(pixels, samples.values[:, 0].numpy(), atol=0.5001 / 255)


def test_videos_are_a_list_of_frames() -> None:
    values = torch.linspace(0, 1, 2 * 3 * 3 * 4 * 4).reshape(2, 3, 3, 4, 4)  # (B, F, C, H, W)
    images = Samples(values=values, pixels=True, settings={}).images()
    assert [(image.mode, image.size) for image in images] == [("RGB", (4, 4))] * 6
    assert images[-1].getpixel((3, 3)) == tuple((values[1, 2, :, 3, 3] * 255).round().int().tolist())


def test_latents_are_no_pictures(latents: TinyBundle, tmp_path: Path) -> None:
    samples = dyexport.sample(latents.root, labels=[1], steps=2)
    assert not samples.pixels
    with pytest.raises(UsageError, match="latents; pass the vae"):
        samples.images()
    with pytest.raises(UsageError, match=r"x\.png is no \.safetensors"):
        samples.save(tmp_path / "x.png")
    samples.save(tmp_path / "x.safetensors")
    torch.testing.assert_close(load_file(tmp_path / "x.safetensors")["latents"], samples.values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "a cat"}, "prompts does nothing here: .* samples from class labels"),
        ({"height": 64}, "height does nothing here"),
        ({"vae": "x"}, "vae does nothing here: .* samples pixels"),
        ({"steps": 0}, "steps is 0"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": [1, 2], "labels": [1]}, "2 seeds for 1 samples"),
        ({"labels": [11]}, "labels must be in"),
        ({"labels": 3}, r"labels are 3; give a list of classes, such as \[3, 7\]"),
        ({"labels": ["a"]}, "labels must be in"),
        ({"labels": []}, "labels must be in"),
        ({"scheduler": "ddim"}, "use euler"),
    ],
)
def test_what_the_model_does_not_take_is_refused(sit_tiny: Bundle, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dyexport.sample(sit_tiny.root, **arguments)  # type: ignore[arg-type]
