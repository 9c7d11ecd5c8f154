"""Latents are those of diffusers' own VAE and text encoders, and a killed encoding goes on after its last shard."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import signal
import struct
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline, QwenImagePipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps
from safetensors.torch import load_file

from dyexport.backbones.sampling import dtype_argument
from dyexport.digits import load_digits
from dyexport.encoding.buckets import Size
from dyexport.encoding.encode import Encoding, check_output
from dyexport.encoding.index import read_contents
from dyexport.encoding.pixels import read_pixels, without_ends
from dyexport.encoding.settings import EncodeSettings
from dyexport.errors import CheckpointError, DataError, DyexportError, DyexportWarning, UsageError
from dyexport.pictures.opening import open_picture
from dyexport.presets import get_preset
from dyexport.training.data import open_source
from dyexport.training.data_record import read_record
from tests.encoding.folders import class_folder, encode, picture
from tests.pipeline.tiny_pipeline import save_pipeline, save_qwen_image_pipeline, small_vae

SIZE = 32
LATENTS = (4, SIZE // 8, SIZE // 8)
MODEL = replace(
    get_preset("dit-digits"), name="dit-encoded", in_channels=4, sample_size=4, classes=2, pixel_space=False
)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("vae")
    small_vae(scaling_factor=0.5, shift_factor=0.25).save_pretrained(directory)
    return directory


def settings_of(folder: Path, place: Path, **values: Any) -> EncodeSettings:
    return EncodeSettings(**{"folder": folder, "vae": str(place), "preset": MODEL, **values})


def by_contents(files: Iterable[Path]) -> list[Path]:
    """Sort files as samples of one label are."""
    return sorted(files, key=lambda file: hashlib.sha256(file.read_bytes()).hexdigest())


def rows_of(directory: Path) -> dict[str, torch.Tensor]:
    shards = [load_file(file) for file in sorted(directory.glob("*.safetensors"))]
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}


def pixels_of(files: list[Path], height: int, width: int | None = None) -> torch.Tensor:
    """Pixels (B, 3, height, width) as diffusers makes them, by default of squares."""
    images = [Image.open(file).convert("RGB") for file in files]
    return VaeImageProcessor(vae_scale_factor=1).preprocess(images, height, width or height, resize_mode="crop")


def test_latents_are_those_of_diffusers(vae: Path, tmp_path: Path) -> None:
    folder = class_folder(tmp_path / "pictures")
    picture(folder / "dogs" / "tall.png", seed=9, width=20, height=70)
    encoded = encode(settings_of(folder, vae), tmp_path / "latents")
    files = [file for name in ("cats", "dogs") for file in by_contents((folder / name).iterdir())]
    model = AutoencoderKL.from_pretrained(vae)
    with torch.no_grad():
        expected = (model.encode(pixels_of(files, SIZE)).latent_dist.mode() - 0.25) * 0.5
    rows = rows_of(tmp_path / "latents")
    torch.testing.assert_close(rows["latents"], expected, atol=1e-5, rtol=1e-5)
    assert rows["labels"].tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert encoded.record.classes == ("cats", "dogs")
    assert encoded.record.scaling == {"scaling_factor": 0.5, "shift_factor": 0.25}
    assert encoded.record.mean == pytest.approx(float(expected.mean()), abs=1e-5)
    assert encoded.record.std == pytest.approx(float(expected.std(correction=0)), abs=1e-5)
    batch = open_source(str(tmp_path / "latents"), MODEL).batch(torch.arange(7))
    assert torch.equal(batch.latents, rows["latents"])


def captioned(root: Path, count: int = 2) -> Path:
    for number in range(count):
        picture(root / f"{number}.png", seed=number).with_suffix(".txt").write_text(f"a picture {'of it' * number}")
    return root


def test_packed_latents_and_captions_are_those_of_the_pipeline(tmp_path: Path) -> None:
    folder, pipeline, preset = captioned(tmp_path / "p"), save_pipeline(tmp_path / "flux"), get_preset("flux-tiny")
    settings = EncodeSettings.complete(folder, model="flux-tiny", pipeline=str(pipeline))
    encode(settings, tmp_path / "latents")
    rows = rows_of(tmp_path / "latents")
    pipe = FluxPipeline.from_pretrained(pipeline)
    files = by_contents(folder.glob("*.png"))
    with torch.no_grad():
        latents = (pipe.vae.encode(pixels_of(files, 128)).latent_dist.mode() - 0.1) * 0.3
        pipe.to(torch.bfloat16)
        texts = [file.with_suffix(".txt").read_text().strip() for file in files]
        text, pooled, _ = pipe.encode_prompt(texts, None, max_sequence_length=preset.text_tokens)
    torch.testing.assert_close(rows["latents"], pipe._pack_latents(latents, *latents.shape), atol=1e-5, rtol=1e-5)
    assert torch.equal(rows["prompt_embeds"], text)
    assert torch.equal(rows["pooled_prompt_embeds"], pooled)
    assert len(open_source(str(tmp_path / "latents"), preset)) == 2


def test_captions_that_are_cut_are_not_printed(tmp_path: Path) -> None:
    folder = captioned(tmp_path / "pictures", count=1)
    (folder / "0.txt").write_text("a picture of it " * 200)
    printed: list[str] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: printed.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    settings = EncodeSettings.complete(folder, model="flux-tiny", pipeline=str(save_pipeline(tmp_path / "flux")))
    try:
        for logger in loggers:
            logger.addHandler(listener)
        encode(settings, tmp_path / "latents")
    finally:
        for logger in loggers:
            logger.removeHandler(listener)
    assert not [line for line in printed if "sequence" in line]


def test_captions_under_classifier_free_guidance_come_with_the_unconditional_prompt(tmp_path: Path) -> None:
    folder, pipeline = captioned(tmp_path / "p"), save_qwen_image_pipeline(tmp_path / "qwen")
    preset = get_preset("qwen-image-tiny")
    encode(EncodeSettings.complete(folder, model=preset.name, pipeline=str(pipeline)), tmp_path / "latents")
    rows = rows_of(tmp_path / "latents")
    pipe = QwenImagePipeline.from_pretrained(pipeline)
    with torch.no_grad():
        files = by_contents(folder.glob("*.png"))
        pixels = pixels_of(files, 128)
        latents = pipe.vae.encode(pixels.unsqueeze(2)).latent_dist.mode()  # (2, 4, 1, 16, 16)
        packed = pipe._pack_latents((latents - 0.1) / 0.9, 2, 4, 16, 16)
        captions = [file.with_suffix(".txt").read_text().strip() for file in files]
        encoders = QwenImagePipeline.from_pretrained(pipeline, **dtype_argument(torch.bfloat16))
        embedded = [
            encoders.encode_prompt([text], max_sequence_length=preset.text_tokens)
            for text in (captions[0], " ", captions[1])
        ]
    torch.testing.assert_close(rows["latents"], packed[[0, 0, 1]], atol=1e-5, rtol=1e-5)
    for row, (text, mask) in enumerate(embedded):
        width = text.shape[1]
        assert torch.equal(rows["prompt_embeds"][row, :width], text[0])
        assert torch.equal(
            rows["prompt_embeds_mask"][row, :width], torch.ones(width) if mask is None else mask[0].float()
        )
        assert not rows["prompt_embeds"][row, width:].any()
        assert not rows["prompt_embeds_mask"][row, width:].any()
    assert len(open_source(str(tmp_path / "latents"), preset)) == 3


def test_mirrored_pictures_are_encoded_by_themselves(vae: Path, tmp_path: Path) -> None:
    folder = class_folder(tmp_path / "pictures", count=1)
    encode(settings_of(folder, vae, flip=True), tmp_path / "latents")
    rows = rows_of(tmp_path / "latents")
    pixels = pixels_of(sorted(folder.rglob("*.png")), SIZE)
    both = torch.stack([pixels, pixels.flip(-1)], dim=1).flatten(0, 1)  # (4, 3, H, W)
    with torch.no_grad():
        expected = (AutoencoderKL.from_pretrained(vae).encode(both).latent_dist.mode() - 0.25) * 0.5
    torch.testing.assert_close(rows["latents"], expected, atol=1e-5, rtol=1e-5)
    assert rows["labels"].tolist() == [0, 0, 1, 1]


def test_pictures_of_a_model_of_pixels_need_no_vae(tmp_path: Path) -> None:
    digits = load_digits("train")
    for label in range(10):
        pixels = digits.pictures[digits.labels == label][0, 0]  # (8, 8)
        file = tmp_path / "pictures" / str(label) / "1.png"
        file.parent.mkdir(parents=True)
        Image.fromarray((pixels * 255).round().astype(np.uint8)).save(file)
    encode(EncodeSettings.complete(tmp_path / "pictures", model="dit-digits"), tmp_path / "latents")
    rows = rows_of(tmp_path / "latents")
    expected = torch.stack([torch.from_numpy(digits.pictures[digits.labels == label][0]) for label in range(10)])
    torch.testing.assert_close(rows["latents"], (expected * 255).round() / 127.5 - 1, atol=1e-6, rtol=0)
    assert len(open_source(str(tmp_path / "latents"), get_preset("dit-digits"))) == 10


def test_transparent_and_turned_pictures(vae: Path, tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    wide = Image.new("RGB", (16, 8))
    wide.paste((255, 255, 255), (0, 0, 8, 8))
    wide.save(tmp_path / "turned.png", exif=exif)
    clear, turned = (read_pixels(tmp_path / name, Size(16, 8)) for name in ("clear.png", "turned.png"))
    assert (clear == 1).all()
    assert (turned[:, :8] == 1).all()
    assert (turned[:, 8:] == -1).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tiff", ".jpg", ".webp"])
def test_pictures_of_every_orientation_are_upright(suffix: str, orientation: int, tmp_path: Path) -> None:
    quarters = Image.fromarray(np.array([[0, 80], [160, 255]], dtype=np.uint8)).resize(
        (32, 16), Image.Resampling.NEAREST
    )
    exif, file = Image.Exif(), tmp_path / f"picture{suffix}"
    exif[0x0112] = orientation
    quarters.convert("RGB").save(file, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(file))
    assert np.array_equal(np.asarray(open_picture(file)), np.asarray(upright))
    (contents,) = read_contents([file], tmp_path / "index", lambda *_: None)
    assert contents.size == (upright.height, upright.width) == ((16, 32) if orientation < 5 else (32, 16))


def test_a_picture_whose_exif_data_are_damaged_is_turned(tmp_path: Path) -> None:
    """Pillow reads the orientation of this file, and fails to write its other entries."""
    exif, file = Image.Exif(), tmp_path / "picture.jpg"
    exif[0x0112], exif[0x010E] = 6, "a text"
    picture(tmp_path / "plain.png")
    Image.open(tmp_path / "plain.png").save(file, exif=exif)
    content = file.read_bytes()
    assert b"\x01\x0e\x00\x02" in content
    file.write_bytes(content.replace(b"\x01\x0e\x00\x02", b"\x01\x16\x00\x02"))  # a number, and so no text
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(file))
    assert open_picture(file).size == (24, 40)


def test_a_very_long_picture_is_cropped_before_it_is_resized(tmp_path: Path) -> None:
    for width, height in ((3, 3000), (3000, 3)):
        opened = without_ends(open_picture(picture(tmp_path / "long.png", width=width, height=height)), Size(64, 64))
        assert sorted(opened.size) == [3, 6]
    ramp = np.broadcast_to(np.linspace(0, 255, 600, dtype=np.uint8), (16, 600))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    expected = pixels_of([tmp_path / "ramp.png"], 32)[0]
    torch.testing.assert_close(read_pixels(tmp_path / "ramp.png", Size(32, 32)), expected, atol=2 / 127.5, rtol=0)
    whole = Image.new("RGB", (60, 40))
    assert without_ends(whole, Size(32, 32)).size == whole.size


def test_gray_pictures_of_16_bits_keep_their_values(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    for name in ("gray.png", "gray.tiff"):
        Image.fromarray(values).save(tmp_path / name)
        pixels = read_pixels(tmp_path / name, Size(8, 8))
        expected = torch.from_numpy(values.astype(np.float32) / 32767.5 - 1)
        torch.testing.assert_close(pixels, expected.expand(3, 8, 8), atol=1 / 127, rtol=0)


@pytest.mark.parametrize(("kind", "name"), [("int32", "whole numbers"), ("float32", "floating-point numbers")])
def test_pixels_without_a_range_are_refused(kind: str, name: str, vae: Path, tmp_path: Path) -> None:
    folder = class_folder(tmp_path / "pictures", count=1)
    Image.fromarray(np.ones((40, 40), dtype=kind)).save(folder / "cats" / "wide.tiff")
    with pytest.raises(DataError, match=f"cats/wide.tiff: its pixels are {name} of 32 bits, .*; remove it, or save"):
        encode(settings_of(folder, vae), tmp_path / "latents")


def test_what_is_no_picture_is_named_in_words(vae: Path, tmp_path: Path) -> None:
    folder = class_folder(tmp_path / "pictures", count=1)
    (folder / "cats" / "1.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"cats/1.jpg: it is no picture, or is damaged; remove it"):
        encode(settings_of(folder, vae), tmp_path / "latents")
    (folder / "cats" / "1.jpg").unlink()
    (folder / "cats" / "1.jpg").symlink_to("gone")
    with pytest.raises(DataError, match=r"cannot read the picture .*cats/1.jpg: No such file or directory; remove it"):
        encode(settings_of(folder, vae), tmp_path / "latents")


def test_enlarged_pictures_are_warned_of(vae: Path, tmp_path: Path) -> None:
    folder = class_folder(tmp_path / "pictures", count=1)  # 40 x 24
    picture(folder / "cats" / "tiny.png", width=50, height=7)
    with pytest.warns(DyexportWarning, match=r"3 of 3 .* enlarged.*tiny.png, is 50 x 7 px and becomes 32 x 32"):
        encode(settings_of(folder, vae), tmp_path / "latents")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DyexportWarning)
        settings = EncodeSettings(folder=class_folder(tmp_path / "large", count=1), vae=str(vae), size=24)
        Encoding(settings).samples(tmp_path / "index", lambda *_: None)


def test_latents_are_readable_as_other_files_are(vae: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    encode(settings_of(class_folder(tmp_path / "pictures", count=1), vae), tmp_path / "latents")
    modes = {file.stat().st_mode for file in (*(tmp_path / "latents").iterdir(), tmp_path / "file")}
    assert len(modes) == 1


def test_labels_that_are_numbers_need_no_names(vae: Path, tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    for number in range(2):
        picture(root / f"{number}.png", seed=number)
    (root / "metadata.csv").write_text("file_name,label\n0.png,1\n1.png,0\n")
    encoded = encode(settings_of(root, vae), tmp_path / "latents")
    assert encoded.record.classes is None
    assert rows_of(tmp_path / "latents")["labels"].tolist() == [0, 1]
    assert len(open_source(str(tmp_path / "latents"), replace(MODEL, classes=1000))) == 2
    (root / "metadata.csv").write_text("file_name,label\n0.png,2\n1.png,0\n")
    with pytest.raises(DataError, match=r"0.png in .* has the label 2, outside \[0, 2\), the classes of dit-encoded"):
        encode(settings_of(root, vae), tmp_path / "other")


def test_training_on_latents_of_another_scale_is_warned_of(tmp_path: Path) -> None:
    small_vae(scaling_factor=0.001).save_pretrained(tmp_path / "vae")
    folder = class_folder(tmp_path / "pictures", count=1)
    encode(settings_of(folder, tmp_path / "vae"), tmp_path / "latents")
    with pytest.warns(DyexportWarning, match=r"the latents in .* have a standard deviation of .*; check that the VAE"):
        open_source(str(tmp_path / "latents"), MODEL)


def test_corrupt_pictures_are_named_before_anything_is_encoded(vae: Path, tmp_path: Path) -> None:
    folder = class_folder(tmp_path / "pictures")
    bad = folder / "cats" / "0.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    (folder / "dogs" / "1.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"cannot read the picture .*cats/0.png: .*so are .*dogs/1.jpg; remove it"):
        encode(settings_of(folder, vae), tmp_path / "latents")
    assert not list((tmp_path / "latents").glob("*.safetensors"))
    bad.write_bytes(whole)
    (folder / "dogs" / "1.jpg").unlink()
    assert encode(settings_of(folder, vae), tmp_path / "latents").record.samples == 6


def killed(settings: EncodeSettings, out: Path) -> None:
    """Encode until the second shard is under way, and be killed."""
    encoding = Encoding(settings)
    out.mkdir()

    def progress(phase: str, done: int, total: int, detail: str) -> None:
        if phase == "encoding" and done > 256:
            os.kill(os.getpid(), signal.SIGKILL)

    encoding.write(encoding.samples(out / "pictures.jsonl", progress), out, progress)


def test_a_killed_encoding_goes_on_after_its_last_shard(vae: Path, tmp_path: Path) -> None:
    folder = class_folder(tmp_path / "pictures", count=168)
    settings = settings_of(folder, vae, preset=None, size=8)
    out = tmp_path / "latents"
    process = multiprocessing.get_context("fork").Process(target=killed, args=(settings, out))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (kept,) = out.glob("*.safetensors")
    written = kept.stat()
    with pytest.raises(DataError, match="holds a part of its latents; repeat the `dyexport encode`"):
        open_source(str(out), MODEL)
    resumed = encode(settings, out)
    assert (resumed.shards, resumed.reused) == (2, 256)
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    undisturbed = encode(settings, tmp_path / "undisturbed", index=tmp_path / "index")
    for file in undisturbed.directory.iterdir():
        assert file.read_bytes() == (out / file.name).read_bytes()


def test_pictures_that_changed_are_encoded_again_and_others_are_not(vae: Path, tmp_path: Path) -> None:
    folder, out = class_folder(tmp_path / "pictures", count=168), tmp_path / "latents"
    settings = settings_of(folder, vae, preset=None, size=8)
    first = encode(settings, out)
    assert encode(settings, out).reused == 336
    picture(folder / "dogs" / "99.png", seed=1234)
    again = encode(settings, out)
    assert again.reused == 335
    assert again.record.mean != first.record.mean
    for number in range(100, 168):
        (folder / "dogs" / f"{number}.png").unlink()
    fewer = encode(settings, out)
    assert fewer.record.samples == len(rows_of(out)["labels"]) == 268
    for number in range(50, 100):
        (folder / "dogs" / f"{number}.png").unlink()
    assert encode(settings, out).shards == len(list(out.glob("*.safetensors"))) == 1


def test_latents_of_other_options_are_not_replaced(vae: Path, tmp_path: Path) -> None:
    folder, out = class_folder(tmp_path / "pictures", count=1), tmp_path / "latents"
    settings = settings_of(folder, vae)
    encode(settings, out)
    check_output(out, Encoding(settings))
    small_vae().save_pretrained(tmp_path / "other")
    changes = {
        "size": {"size": 64, "preset": None},
        "choice of --flip": {"flip": True},
        "VAE": {"vae": str(tmp_path / "other")},
    }
    for name, change in changes.items():
        with pytest.raises(UsageError, match=f"holds latents of another {name}; give another directory"):
            check_output(out, Encoding(replace(settings, **change)))
    for place, message in ((folder / "latents", "lies in the folder of the pictures"), (tmp_path, "is not empty and")):
        with pytest.raises(UsageError, match=message):
            check_output(place, Encoding(settings))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"preset": get_preset("latte-tiny")},
            "latte-tiny makes videos of 4 frames, and a folder of pictures has none",
        ),
        ({"preset": get_preset("flux-fill")}, "flux-fill edits pictures"),
        (
            {"preset": get_preset("flux-tiny")},
            "captions of flux-tiny are embedded by its text encoders; give a diff",
        ),
        ({"preset": get_preset("sit-digits")}, "sit-digits samples pixels, which no VAE encodes; leave --vae"),
        ({"vae": None}, "encoding pictures takes a VAE; give --vae"),
        ({"vae": "gone/"}, "--vae gone/ does not exist"),
        ({"size": 0}, "--size is 0"),
        ({"size": 30}, "--size is 30, and this VAE takes multiples of 8"),
        ({"size": 64}, r"64 px make latents \(4, 8, 8\), and dit-encoded takes \(4, 4, 4\); leave --size out"),
        ({"preset": replace(MODEL, in_channels=16)}, "takes .16, 4, 4.; give --vae with the model's own"),
        ({"preset": replace(MODEL, in_channels=16), "size": 32}, "takes .16, 4, 4.; give --vae with the model's own"),
        ({"preset": replace(MODEL, classes=1000)}, r"has 2 classes \(cats, dogs\) and dit-encoded 1000"),
        ({"vae": "PICTURES"}, "cannot read an AutoencoderKL from"),
        ({"classes": Path("gone")}, "cannot read --classes gone"),
    ],
)
def test_what_cannot_be_encoded_is_refused_early(
    values: dict[str, Any], message: str, vae: Path, tmp_path: Path
) -> None:
    folder = class_folder(tmp_path / "pictures", count=1)
    changed = {name: str(folder) if value == "PICTURES" else value for name, value in values.items()}
    with pytest.raises(DyexportError, match=message):
        Encoding(settings_of(folder, vae, **changed))


def test_a_pipeline_without_a_transformer_needs_a_model(vae: Path, tmp_path: Path) -> None:
    folder = captioned(tmp_path / "pictures")
    with pytest.raises(
        CheckpointError, match=r"does not say which model it is of \(.*has no config.json\); give --model"
    ):
        EncodeSettings.complete(folder, pipeline=str(tmp_path))
    with pytest.raises(CheckpointError, match=r"has no model_index\.json, so it has no text encoders; give"):
        EncodeSettings.complete(folder, model="flux-tiny", pipeline=str(tmp_path), vae=str(vae))


def test_a_vae_of_nan_is_named_with_the_picture(tmp_path: Path) -> None:
    broken = small_vae()
    torch.nn.init.constant_(broken.quant_conv.bias, torch.nan)
    broken.save_pretrained(tmp_path / "vae")
    folder = class_folder(tmp_path / "pictures", count=1)
    with pytest.raises(CheckpointError, match=r"makes NaN or infinity of .*cats/0.png"):
        encode(settings_of(folder, tmp_path / "vae"), tmp_path / "latents")


def test_data_of_other_classes_is_refused(vae: Path, tmp_path: Path) -> None:
    encode(settings_of(class_folder(tmp_path / "pictures", count=1), vae), tmp_path / "latents")
    with pytest.raises(DataError, match=r"latents has 2 classes \(cats, dogs\) and ten 10; encode with a folder for"):
        open_source(str(tmp_path / "latents"), replace(MODEL, name="ten", classes=10))
    (tmp_path / "latents" / "encoding.json").write_text('{"version": 1}')
    with pytest.raises(DataError, match=r"cannot read .*encoding.json .options: Field required.; delete"):
        read_record(tmp_path / "latents")
