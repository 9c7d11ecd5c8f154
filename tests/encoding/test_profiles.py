"""Embedded color profiles: pictures are converted to sRGB."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from dyexport.encoding.encode import Encoding
from dyexport.encoding.settings import EncodeSettings
from dyexport.errors import DyexportWarning
from dyexport.pictures.opening import open_picture
from tests.encoding import color_profiles as profiles
from tests.encoding.folders import class_folder, encode
from tests.pipeline.tiny_pipeline import small_vae

ADOBE = profiles.matrix_profile(profiles.ADOBE, profiles.gamma_curve(profiles.ADOBE_GAMMA))
DISPLAY_P3 = profiles.matrix_profile(profiles.DISPLAY_P3, profiles.srgb_curve())


def pixels() -> np.ndarray:
    """Colors in 8 bits (16, 16, 3), with the corners of the cube."""
    values = np.random.default_rng(0).integers(0, 256, (256, 3))
    values[:8] = 255 * np.array(list(product((0, 1), repeat=3)))
    return values.reshape(16, 16, 3).astype(np.uint8)


def of_adobe(values: np.ndarray) -> np.ndarray:
    matrix = np.linalg.inv(profiles.primaries_to_xyz(profiles.SRGB)) @ profiles.primaries_to_xyz(profiles.ADOBE)
    return profiles.linear_to_srgb((values / 255) ** profiles.ADOBE_GAMMA @ matrix.T)


def of_display_p3(values: np.ndarray) -> np.ndarray:
    matrix = np.linalg.inv(profiles.primaries_to_xyz(profiles.SRGB)) @ profiles.primaries_to_xyz(profiles.DISPLAY_P3)
    return profiles.linear_to_srgb(profiles.srgb_to_linear(values / 255) @ matrix.T)


def opened(file: Path) -> np.ndarray:
    return np.asarray(open_picture(file)).astype(int)


@pytest.mark.parametrize(("profile", "convert"), [(ADOBE, of_adobe), (DISPLAY_P3, of_display_p3)])
def test_wide_gamuts_are_converted(profile: bytes, convert: object, tmp_path: Path) -> None:
    assert callable(convert)
    for name in ("p.png", "p.tiff", "p.webp"):
        Image.fromarray(pixels()).save(tmp_path / name, icc_profile=profile, lossless=True)
        assert np.abs(opened(tmp_path / name) - convert(pixels())).max() <= 1
    assert np.abs(pixels() - convert(pixels())).max() > 20


def test_transparent_and_indexed_pictures_are_converted(tmp_path: Path) -> None:
    expected, alpha = of_adobe(pixels()), np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(np.dstack([pixels(), alpha])).save(tmp_path / "alpha.png", icc_profile=ADOBE)
    over_white = 255 + (expected - 255) * alpha[..., None] / 255
    assert np.abs(opened(tmp_path / "alpha.png") - over_white).max() <= 2
    indexed = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16), mode="P")
    indexed.putpalette(pixels().tobytes())
    indexed.save(tmp_path / "indexed.png", icc_profile=ADOBE)
    assert np.abs(opened(tmp_path / "indexed.png") - expected).max() <= 1
    indexed.save(tmp_path / "clear.png", icc_profile=ADOBE, transparency=5)
    clear = opened(tmp_path / "clear.png")
    assert (clear[0, 5] == 255).all()
    assert np.abs(clear[1:] - expected[1:]).max() <= 1


def test_gray_pictures_are_converted(tmp_path: Path) -> None:
    values, profile = np.arange(256).reshape(16, 16), profiles.gray_profile(1.0)
    expected = profiles.linear_to_srgb(values / 255)[..., None]
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "gray.png", icc_profile=profile)
    Image.fromarray((values * 257).astype(np.uint16)).save(tmp_path / "deep.png", icc_profile=profile)
    for name in ("gray.png", "deep.png"):
        assert np.abs(opened(tmp_path / name) - expected).max() <= 1
    layers = [Image.fromarray(values.astype(np.uint8)), Image.new("L", (16, 16), 0)]
    Image.merge("LA", layers).save(tmp_path / "clear.png", icc_profile=profile)
    assert (opened(tmp_path / "clear.png") == 255).all()
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "wide.png", icc_profile=ADOBE)
    assert np.abs(opened(tmp_path / "wide.png") - of_adobe(np.dstack([values] * 3))).max() <= 1


def test_inks_are_converted(tmp_path: Path) -> None:
    """Full inks are the nodes of the profile's table, so their colors need no interpolation."""
    colors = np.zeros((2, 2, 2, 2, 3), dtype=int)
    for cyan, magenta, yellow in product((0, 1), repeat=3):
        colors[cyan, magenta, yellow, 0] = (255 - 205 * cyan, 255 - 180 * magenta, 255 - 190 * yellow)
    inks = np.array(list(product((0, 255), repeat=4)), dtype=np.uint8)
    tiles = np.kron(inks.reshape(4, 4, 4), np.ones((8, 8, 1), dtype=np.uint8))  # (32, 32, 4)
    profile = profiles.ink_profile(colors)
    Image.fromarray(tiles, mode="CMYK").save(tmp_path / "inks.jpg", quality=100, icc_profile=profile)
    expected = np.kron(colors.reshape(4, 4, 3), np.ones((8, 8, 1), dtype=int))
    assert np.abs(opened(tmp_path / "inks.jpg") - expected).max() <= 3
    Image.fromarray(tiles, mode="CMYK").save(tmp_path / "inks.jpg", quality=100)
    assert np.abs(opened(tmp_path / "inks.jpg") - expected).max() > 40


def test_a_profile_of_srgb_changes_no_value(tmp_path: Path) -> None:
    made = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (made, profiles.matrix_profile(profiles.SRGB, profiles.srgb_curve())):
        Image.fromarray(pixels()).save(tmp_path / "p.png", icc_profile=profile)
        assert np.abs(opened(tmp_path / "p.png") - pixels().astype(int)).max() <= 1


def test_threads_share_transforms(tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(0, 256, (8, 200, 200, 3), dtype=np.uint8)
    files = [tmp_path / f"{number}.png" for number in range(8)]
    for file, picture in zip(files, values, strict=True):
        Image.fromarray(picture).save(file, icc_profile=ADOBE)
    one_by_one = [opened(file) for file in files]
    with ThreadPoolExecutor(8) as pool:
        assert all(map(np.array_equal, pool.map(opened, files), one_by_one))


@pytest.mark.parametrize(
    "profile", [b"no profile", ADOBE[:200], profiles.gray_profile(1.75), profiles.ink_profile(np.zeros((16, 3)))]
)
def test_a_profile_that_cannot_be_used_is_ignored(profile: bytes, tmp_path: Path) -> None:
    Image.fromarray(pixels()).save(tmp_path / "p.png", icc_profile=profile)
    assert np.array_equal(opened(tmp_path / "p.png"), pixels())


def test_profiles_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    small_vae(scaling_factor=4.0).save_pretrained(tmp_path / "vae")
    folder = class_folder(tmp_path / "pictures", count=3)
    settings = EncodeSettings(folder=folder, vae=str(tmp_path / "vae"), size=16)
    Image.fromarray(pixels()).save(folder / "cats" / "adobe.png", icc_profile=ADOBE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DyexportWarning)
        encode(settings, tmp_path / "latents")
    for name in ("cats/a.png", "dogs/b.png"):
        Image.fromarray(pixels()).save(folder / name, icc_profile=b"no profile")
    for _ in range(2):  # the second time, no picture is read
        with pytest.warns(DyexportWarning) as caught:
            encode(settings, tmp_path / "latents")
        (message,) = [str(warning.message) for warning in caught]
        assert message.startswith(f"2 of 9 pictures, such as {folder}/cats/a.png, have a color profile that is damaged")


def test_a_picture_that_was_read_before_profiles_were_is_read_again(tmp_path: Path) -> None:
    small_vae(scaling_factor=4.0).save_pretrained(tmp_path / "vae")
    folder, index = class_folder(tmp_path / "pictures", count=2), tmp_path / "index"
    Image.fromarray(pixels()).save(folder / "cats" / "0.png", icc_profile=ADOBE)
    encoding = Encoding(EncodeSettings(folder=folder, vae=str(tmp_path / "vae"), size=16))
    samples = encoding.samples(index, lambda *_: None)
    assert sum(sample.profiled for sample in samples) == 1
    index.write_text("\n".join(line.rpartition(",")[0] + "]" for line in index.read_text().splitlines()) + "\n")
    assert encoding.samples(index, lambda *_: None) == samples
