"""Pictures are encoded once, and the result depends on the pictures alone, not on the runs that led to it."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dyexport.encoding.encode import Encoded, Encoding
from dyexport.encoding.settings import EncodeSettings
from dyexport.errors import DataError
from dyexport.training.data import open_source
from tests.encoding.folders import class_folder, encode, picture
from tests.encoding.test_encode import MODEL
from tests.pipeline.tiny_pipeline import save_pipeline, save_qwen_image_pipeline, small_vae

MODEL_16 = replace(MODEL, sample_size=2)  # of pictures of 16 px


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut shards of four samples."""
    monkeypatch.setattr("dyexport.encoding.encode.FEWEST", 4)
    monkeypatch.setattr("dyexport.encoding.encode.MOST", 4)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("vae")
    small_vae(scaling_factor=4.0).save_pretrained(directory)
    return directory


@pytest.fixture
def settings(vae: Path, tmp_path: Path) -> EncodeSettings:
    """Settings of a folder with 14 pictures in two classes."""
    return EncodeSettings(folder=class_folder(tmp_path / "pictures", count=7), vae=str(vae), size=16, flip=True)


def same(one: Path, other: Path) -> bool:
    """Compare latents and records, but for the index of pictures, which has their paths."""
    files = [
        {file.name: file.read_bytes() for file in place.iterdir() if file.suffix != ".jsonl"} for place in (one, other)
    ]
    return files[0] == files[1]


def add(folder: Path) -> None:
    for number in range(3):
        picture(folder / "dogs" / f"a{number}.png", seed=100 + number)
    picture(folder / "cats" / "z.png", seed=103)


def remove(folder: Path) -> None:
    for name in ("cats/0.png", "cats/3.png", "dogs/6.png"):
        (folder / name).unlink()


def rename(folder: Path) -> None:
    (folder / "cats" / "0.png").rename(folder / "cats" / "9.png")
    (folder / "dogs" / "6.png").rename(folder / "dogs" / "00.png")


def relabel(folder: Path) -> None:
    (folder / "cats" / "2.png").rename(folder / "dogs" / "22.png")


def everything(folder: Path) -> None:
    for change in (add, rename, relabel):
        change(folder)
    (folder / "dogs" / "3.png").unlink()


@pytest.mark.parametrize(
    ("change", "samples", "reused"),
    [(add, 36, 28), (remove, 22, 22), (rename, 28, 28), (relabel, 28, 28), (everything, 34, 26)],
)
def test_only_new_pictures_are_encoded(
    change: Callable[[Path], None], samples: int, reused: int, settings: EncodeSettings, tmp_path: Path
) -> None:
    out = tmp_path / "latents"
    assert encode(settings, out).reused == 0
    before = open_source(str(out), MODEL_16).name
    change(settings.folder)
    encoding = Encoding(settings)
    encoded = encoding.write(encoding.samples(out / "pictures.jsonl", lambda *_: None), out, lambda *_: None)
    assert (encoded.record.samples, encoded.reused) == (samples, reused)
    assert ("_vae" in vars(encoding.pictures)) == (samples > reused)
    fresh = encode(settings, tmp_path / "fresh").directory
    assert same(out, fresh)
    assert (open_source(str(out), MODEL_16).name == before) == (change is rename)


def test_an_update_takes_little_space(settings: EncodeSettings, tmp_path: Path) -> None:
    """Shards that were replaced are removed as the update proceeds, not after it."""
    out = tmp_path / "latents"
    encode(settings, out)
    add(settings.folder)
    encoding = Encoding(settings)
    files: list[int] = []

    def progress(phase: str, done: int, total: int, detail: str) -> None:
        files.append(len([file for file in out.iterdir() if file.suffix in (".safetensors", ".replaced")]))

    shards = encoding.write(encoding.samples(out / "pictures.jsonl", progress), out, progress).shards
    assert max(files) <= shards + 2
    assert files[-1] == shards


def test_latents_that_are_up_to_date_can_be_read_at_every_moment(settings: EncodeSettings, tmp_path: Path) -> None:
    out = tmp_path / "latents"
    encode(settings, out)
    encoding = Encoding(settings)
    reads: list[int] = []

    def progress(phase: str, done: int, total: int, detail: str) -> None:
        reads.append(len(open_source(str(out), MODEL_16)))

    encoding.write(encoding.samples(out / "pictures.jsonl", progress), out, progress)
    assert set(reads) == {28}


def test_a_folder_that_is_copied_and_renamed_gives_the_same_data(settings: EncodeSettings, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for number, file in enumerate(sorted(settings.folder.rglob("*.png"), reverse=True)):
        target = copy / file.parent.name / f"{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    first = encode(settings, tmp_path / "latents").directory
    second = encode(EncodeSettings(folder=copy, vae=settings.vae, size=16, flip=True), tmp_path / "other").directory
    assert same(first, second)


def killed(settings: EncodeSettings, out: Path, samples: int) -> None:
    """Encode until so many samples are done, and be killed."""
    encoding = Encoding(settings)

    def progress(phase: str, done: int, total: int, detail: str) -> None:
        if phase == "encoding" and done >= samples:
            os.kill(os.getpid(), signal.SIGKILL)

    encoding.write(encoding.samples(out / "pictures.jsonl", progress), out, progress)


@pytest.mark.parametrize("samples", [1, 4, 13, 29, 34])
def test_nothing_is_lost_if_an_update_is_killed(samples: int, settings: EncodeSettings, tmp_path: Path) -> None:
    out = tmp_path / "latents"
    encode(settings, out)
    everything(settings.folder)
    process = multiprocessing.get_context("fork").Process(target=killed, args=(settings, out, samples))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(DataError, match="holds a part of its latents; repeat the `dyexport encode`"):
        open_source(str(out), MODEL_16)
    resumed = encode(settings, out)
    assert resumed.reused >= max(26, samples - samples % 4)
    assert same(out, encode(settings, tmp_path / "fresh").directory)


def test_an_update_that_is_killed_and_taken_back(settings: EncodeSettings, tmp_path: Path) -> None:
    out, kept = tmp_path / "latents", tmp_path / "kept"
    first = encode(settings, out).directory
    shutil.copytree(first, kept)
    picture(settings.folder / "cats" / "new.png", seed=200)
    process = multiprocessing.get_context("fork").Process(target=killed, args=(settings, out, 1))
    process.start()
    process.join(60)
    (settings.folder / "cats" / "new.png").unlink()
    assert encode(settings, out).reused == 28
    assert same(out, kept)


def captioned(root: Path, count: int) -> Path:
    for number in range(count):
        picture(root / f"{number}.png", seed=number).with_suffix(".txt").write_text(f"a picture {'of it ' * number}")
    return root


@pytest.mark.parametrize(
    ("model", "save"), [("flux-tiny", save_pipeline), ("qwen-image-tiny", save_qwen_image_pipeline)]
)
def test_a_caption_that_changed_is_embedded_and_its_picture_not_encoded(
    model: str, save: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder, out = captioned(tmp_path / "pictures", count=6), tmp_path / "latents"
    settings = EncodeSettings.complete(folder, model=model, pipeline=str(save(tmp_path / "pipeline")))
    first = encode(settings, out)
    (folder / "2.txt").write_text("another fox")
    encoding = Encoding(settings)
    changed = encoding.write(encoding.samples(out / "pictures.jsonl", lambda *_: None), out, lambda *_: None)
    assert changed.reused == first.record.samples
    assert "_vae" not in vars(encoding.pictures)
    (folder / "3.png").unlink()
    (folder / "3.txt").unlink()
    encoding = Encoding(settings)
    encoding.write(encoding.samples(out / "pictures.jsonl", lambda *_: None), out, lambda *_: None)
    assert "_vae" not in vars(encoding.pictures)
    assert encoding.captions is not None
    assert "_pipe" not in vars(encoding.captions)
    assert same(out, encode(settings, tmp_path / "fresh").directory)


def test_latents_of_another_vae_are_not_copied(settings: EncodeSettings, tmp_path: Path) -> None:
    shards = sorted(encode(settings, tmp_path / "latents").directory.glob("*.safetensors"))
    small_vae(scaling_factor=3.0).save_pretrained(tmp_path / "vae")
    changed = EncodeSettings(folder=settings.folder, vae=str(tmp_path / "vae"), size=16, flip=True)
    for other, reused in ((settings, 28), (changed, 0)):
        encoding = Encoding(other)
        samples = encoding.samples(tmp_path / "index", lambda *_: None)
        assert encoding.write(samples, tmp_path / f"out-{reused}", lambda *_: None, shards).reused == reused


def test_a_picture_that_changes_while_pictures_are_encoded_is_named(settings: EncodeSettings, tmp_path: Path) -> None:
    encoding = Encoding(settings)
    samples = encoding.samples(tmp_path / "index", lambda *_: None)
    picture(settings.folder / "dogs" / "1.png", seed=99)
    with pytest.raises(DataError, match=r"dogs/1.png changed while pictures were encoded; repeat the command"):
        encoding.write(samples, tmp_path / "latents", lambda *_: None)
    fresh: Encoded = encode(settings, tmp_path / "latents")
    assert same(fresh.directory, encode(settings, tmp_path / "fresh").directory)
