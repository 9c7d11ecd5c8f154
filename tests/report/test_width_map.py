"""The width map shows the table of widths: in the terminal, as a picture and in the page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dyexport.bundle.reader import Bundle
from dyexport.report.width_map import RAMP, WidthMap, cells, color
from dyexport.report.width_map_image import render_image
from dyexport.report.width_map_text import SHADES, render_text
from tests.bench.text import rendered
from tests.runtime.bundles import TinyBundle, write_bundle


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    return write_bundle(tmp_path_factory.mktemp("widths") / "flow", objective="flow", segments=3)


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    return write_bundle(tmp_path_factory.mktemp("widths") / "ddpm", segments=2)


def test_heat_map_is_the_table(ddpm: TinyBundle) -> None:
    bundle = Bundle.open(ddpm.root)
    heads, groups, tokens = WidthMap.of(bundle, 12).maps
    rows = [ddpm.widths.row(t) for t in cells(bundle, 12)]
    assert (heads.values == ddpm.widths.heads[rows].mean(-1).T).all()
    assert (groups.values == ddpm.widths.groups[rows].mean(-1).T).all()
    assert tokens.values.shape == heads.values.shape
    assert tokens.values.min() >= 0


def test_time_runs_from_noise_to_data(ddpm: TinyBundle, flow: TinyBundle) -> None:
    falling, rising = (WidthMap.of(Bundle.open(bundle.root), 4) for bundle in (ddpm, flow))
    assert falling.timesteps == (875, 625, 375, 125)
    assert rising.timesteps == (0.125, 0.375, 0.625, 0.875)
    assert falling.segments == (1, 1, 0, 0)
    assert falling.boundaries == (2,)
    assert falling.axis == "t = 1000 (noise) to t = 0 (data)"


def test_terminal_map_has_a_row_for_each_block_and_no_need_of_colors(flow: TinyBundle) -> None:
    lines = rendered(render_text(WidthMap.of(Bundle.open(flow.root), 30))).splitlines()
    blocks = [line for line in lines if line.strip().split(" ")[0].isdigit() and line[-1] in SHADES]
    assert len(blocks) == 3 * flow.widths.heads.shape[1]
    assert "0─────────1─────────2─────────" in "\n".join(lines)


def test_ramp_ends_are_off_and_on() -> None:
    assert color(0.0) == RAMP[0]
    assert color(1.0) == RAMP[-1]


def test_ramp_is_ordered_in_gray() -> None:
    """Someone who sees no colors, and a printer without them, must read the same order."""
    luminance = [float(np.dot(color(value), (0.299, 0.587, 0.114))) for value in np.linspace(0, 1, 33)]
    assert luminance == sorted(luminance)


def test_image_has_the_color_of_each_cell(flow: TinyBundle, tmp_path: Path) -> None:
    widths = WidthMap.of(Bundle.open(flow.root), 24)
    pixels = np.array(render_image(widths))
    shown = {tuple(pixel) for pixel in pixels.reshape(-1, 3)}
    for heat_map in widths.maps:
        assert {color(float(value)) for value in heat_map.values.flat} <= shown
