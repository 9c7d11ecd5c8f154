"""Real data that distances are to: folders of pictures, files of features, latents and pictures, digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dyexport.errors import DataError
from dyexport.evaluation.extractors.latents import LatentFeatures
from dyexport.evaluation.reference import BATCH, read_reference
from dyexport.pictures.opening import open_picture
from tests.encoding import color_profiles

SHAPE = (3, 4, 4)
RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (BATCH + 2, 4, 4, 3), dtype=np.uint8)  # (n, H, W, C)
FEATURES = torch.from_numpy(PICTURES).movedim(-1, 1).flatten(1).double() / 255


def read(source: Path, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return read_reference(str(source), LatentFeatures(), shape).features


def test_a_folder_is_searched_for_pictures(tmp_path: Path) -> None:
    (tmp_path / "class" / "deep").mkdir(parents=True)
    for index, picture in enumerate(PICTURES):
        folder = tmp_path / ("class/deep" if index % 2 else "class")
        Image.fromarray(picture).save(folder / f"{index:03}.{'PNG' if index == 0 else 'png'}")
    (tmp_path / "notes.txt").write_text("no picture")
    order = [*range(0, len(PICTURES), 2), *range(1, len(PICTURES), 2)]
    seen: list[tuple[int, int]] = []
    reference = read_reference(
        str(tmp_path), LatentFeatures(), SHAPE, progress=lambda done, total: seen.append((done, total))
    )
    assert torch.allclose(reference.features, FEATURES[order], atol=1e-6)
    assert (reference.resized, seen) == (0, [(BATCH, BATCH + 2), (BATCH + 2, BATCH + 2)])


def test_pictures_of_another_size_are_resized_and_counted(tmp_path: Path) -> None:
    for index, size in enumerate(((4, 4), (16, 8), (2, 2))):  # width, height
        Image.new("RGB", size, (51 * index, 0, 255)).save(tmp_path / f"{index}.png")
    Image.new("LA", (4, 4), (204, 255)).save(tmp_path / "gray.png")
    reference = read_reference(str(tmp_path), LatentFeatures(), SHAPE)
    assert reference.resized == 2
    values = reference.features.reshape(4, 3, 16)[..., 0]
    assert values[:, 0].tolist() == pytest.approx([0, 0.2, 0.4, 0.8], abs=1e-6)
    gray = read_reference(str(tmp_path), LatentFeatures(), (1, 4, 4))
    assert gray.features.shape == (4, 16)


def test_pictures_are_opened_as_those_of_training_are(tmp_path: Path) -> None:
    """On white where they are transparent, 16 bits as 8, colors by their profile."""
    profile = color_profiles.matrix_profile(
        color_profiles.ADOBE, color_profiles.gamma_curve(color_profiles.ADOBE_GAMMA)
    )
    Image.new("RGBA", (4, 4), (0, 0, 0, 51)).save(tmp_path / "0.png")
    Image.fromarray(np.full((4, 4), 153 << 8, dtype=np.uint16)).save(tmp_path / "1.png")
    Image.new("RGB", (4, 4), (200, 100, 50)).save(tmp_path / "2.png", icc_profile=profile)
    transparent, deep, wide = read(tmp_path).reshape(3, 3, 16)[..., 0]
    assert transparent.tolist() == pytest.approx([0.8] * 3)
    assert deep.tolist() == pytest.approx([0.6] * 3)
    expected = np.asarray(open_picture(tmp_path / "2.png"))[0, 0]
    assert wide.tolist() == pytest.approx(expected / 255)
    assert expected[0] > 210, "redder than the stored value"


@pytest.mark.parametrize("name", ["pictures", "arr_0"])
def test_files_of_pictures(tmp_path: Path, name: str) -> None:
    np.savez(tmp_path / "real.npz", **{name: PICTURES, "labels": np.zeros(3)})
    assert torch.allclose(read(tmp_path / "real.npz"), FEATURES, atol=1e-6)


def test_files_of_features_are_taken_as_they_are(tmp_path: Path) -> None:
    save_file({"features": FEATURES.float().half()}, tmp_path / "real.safetensors")
    assert torch.allclose(read(tmp_path / "real.safetensors"), FEATURES, atol=1e-3)


def test_files_of_latents_are_decoded_where_there_is_a_vae(tmp_path: Path) -> None:
    latents = torch.randn(BATCH + 1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    save_file({"latents": latents}, tmp_path / "real.safetensors")
    source = str(tmp_path / "real.safetensors")
    flat = read_reference(source, LatentFeatures(), (2, 4, 4)).features
    assert torch.equal(flat, latents.flatten(1).double())
    decoded = read_reference(source, LatentFeatures(), SHAPE, decode=lambda values: values[:, :1] * 2).features
    assert torch.equal(decoded, latents[:, 0].flatten(1).double() * 2)
    with pytest.raises(DataError, match=r"holds latents \[2, 4, 4\], and samples are \[3, 4, 4\]"):
        read_reference(source, LatentFeatures(), SHAPE)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"weights": np.zeros((4, 3))}, "holds none of features, latents, pictures"),
        ({"features": np.zeros((1, 3))}, "at least 2 rows are needed"),
        ({"features": np.full((4, 3), np.nan)}, "not finite"),
        ({"pictures": np.zeros((4, 4, 4, 3), dtype=np.float32)}, "in uint8"),
        ({"pictures": np.zeros((4, 3, 4, 4), dtype=np.uint8)}, r"pictures are \(n, H, W, 1 or 3\)"),
        ({"features": np.array([{}, {}])}, "Object arrays cannot be loaded"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "real.npz", **arrays)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "real.npz")


def test_what_holds_no_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds 0 pictures \(\.png"):
        read(tmp_path)
    (tmp_path / "a.png").write_bytes(b"not a picture")
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot read the picture .*a\.png"):
        read(tmp_path)
    (tmp_path / "list.txt").write_text("a.png")
    with pytest.raises(DataError, match=r"--real is .*list\.txt; give a folder of pictures, or a file"):
        read(tmp_path / "list.txt")
    (tmp_path / "real.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"cannot read .*real\.npz"):
        read(tmp_path / "real.npz")
