"""Pictures and heat maps show what they are given."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dyexport.bench.heatmap import RAMP, SHADES, cells, color, heat_maps, render_image, render_text, segment_of
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


def test_heat_map_is_the_table(ddpm: TinyBundle) -> None:
    bundle = Bundle.open(ddpm.root)
    heads, groups, tokens = heat_maps(bundle, 12)
    rows = [ddpm.widths.row(t) for t in cells(bundle, 12)]
    assert (heads.values == ddpm.widths.heads[rows].mean(-1).T).all()
    assert (groups.values == ddpm.widths.groups[rows].mean(-1).T).all()
    assert tokens.values.shape == heads.values.shape
    assert tokens.values.min() >= 0


def test_time_runs_from_noise_to_data(ddpm: TinyBundle, flow: TinyBundle) -> None:
    assert cells(Bundle.open(ddpm.root), 4) == [875, 625, 375, 125]
    assert cells(Bundle.open(flow.root), 4) == [0.125, 0.375, 0.625, 0.875]
    assert segment_of(Bundle.open(ddpm.root), 4) == [1, 1, 0, 0]


def test_terminal_map_has_a_row_for_each_block_and_no_need_of_colors(flow: TinyBundle) -> None:
    lines = rendered(render_text(Bundle.open(flow.root), 30)).splitlines()
    depth = ddpm_depth(flow)
    blocks = [line for line in lines if line.strip().split(" ")[0].isdigit() and line[-1] in SHADES]
    assert len(blocks) == 3 * depth
    assert "0─────────1─────────2─────────" in "\n".join(lines)


def ddpm_depth(bundle: TinyBundle) -> int:
    return bundle.widths.heads.shape[1]


def test_ramp_ends_are_off_and_on() -> None:
    assert color(0.0) == RAMP[0]
    assert color(1.0) == RAMP[-1]


def test_image_has_the_color_of_each_cell(flow: TinyBundle) -> None:
    bundle = Bundle.open(flow.root)
    pixels = np.array(render_image(bundle, 24))
    shown = {tuple(pixel) for pixel in pixels.reshape(-1, 3)}
    for heat_map in heat_maps(bundle, 24):
        assert {color(float(value)) for value in heat_map.values.flat} <= shown


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
