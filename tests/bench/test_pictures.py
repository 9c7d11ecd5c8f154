"""Pictures and heat maps show what they are given."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dyexport.bench.pictures import GAP, grid, save_png, side_by_side
from dyexport.bench.report import inspect_table
from dyexport.bundle.reader import Bundle
from dyexport.errors import StorageError
from tests.bench.text import rendered
from tests.runtime.bundles import TinyBundle


def test_grid_places_pictures_row_by_row() -> None:
    pictures = np.linspace(0, 1, 6).reshape(6, 1, 1, 1) * np.ones((6, 1, 4, 5))
    pixels = np.array(grid(pictures, 3))  # (Y, X, 3)
    assert pixels.shape == (2 * (4 + GAP) + GAP, 3 * (5 + GAP) + GAP, 3)
    for index, picture in enumerate(pictures):
        y, x = GAP + index // 3 * (4 + GAP), GAP + index % 3 * (5 + GAP)
        assert (pixels[y : y + 4, x : x + 5] == round(float(picture.max()) * 255)).all()


def test_grid_keeps_colors_and_zooms_without_blur() -> None:
    red = np.zeros((1, 3, 2, 2))
    red[:, 0] = 2.0  # out of range: clipped
    image = grid(red, 1, zoom=3)
    assert image.size == (3 * (2 + 2 * GAP),) * 2
    assert image.getpixel((3 * GAP, 3 * GAP)) == (255, 0, 0)


def test_side_by_side_keeps_each_image() -> None:
    images = {"left": Image.new("RGB", (30, 10), "red"), "right": Image.new("RGB", (40, 20), "blue")}
    sheet = side_by_side(images)
    assert sheet.width >= 70
    assert sheet.getpixel((0, sheet.height - 15)) == (255, 0, 0)
    assert sheet.getpixel((sheet.width - 1, sheet.height - 1)) == (0, 0, 255)


def test_png_is_whole_or_absent(tmp_path: Path) -> None:
    save_png(Image.new("RGB", (3, 3)), tmp_path / "new" / "a.png")
    assert Image.open(tmp_path / "new" / "a.png").size == (3, 3)
    (tmp_path / "taken").mkdir()
    with pytest.raises(StorageError, match="taken: it is a folder"):
        save_png(Image.new("RGB", (3, 3)), tmp_path / "taken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "taken"]


def test_summary_names_what_each_engine_has(ddpm: TinyBundle) -> None:
    text = rendered(inspect_table(Bundle.open(ddpm.root)))
    for segment in ddpm.plan.segments:
        assert f"[{segment.start:.3g}, {segment.end:.3g})" in text
        assert f" {segment.gate_size} " in text


@pytest.mark.parametrize("path", ["/", ".", "pipe", "link"])
def test_a_picture_replaces_nothing_but_a_file(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("link").symlink_to("pipe")
    with pytest.raises(StorageError, match=r"give the name of a file|give a name"):
        save_png(Image.new("L", (2, 2)), Path(path))
    assert Path("pipe").is_fifo()
    assert sorted(found.name for found in tmp_path.iterdir()) == ["link", "pipe"]


def test_a_picture_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "link.png").symlink_to("deep/picture.png")
    save_png(Image.new("L", (2, 2)), tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink()
    assert Image.open(tmp_path / "deep" / "picture.png").size == (2, 2)
