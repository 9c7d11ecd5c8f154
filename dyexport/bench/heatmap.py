"""Heat map of widths: the share of each block that is on, over t and depth, as text or as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Group
from rich.text import Text

from dyexport.bundle.reader import Bundle

Array = np.ndarray

RAMP = ((13, 8, 65), (84, 2, 163), (185, 50, 137), (237, 121, 83), (240, 249, 33))  # dark = off, yellow = on
ASCII_SHADES = ".:+#@"
SHADES = "·░▒▓█"  # repeat the color, for terminals without colors
CELL, MARGIN, LINE = 12, 48, 16  # pixels


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Shares (L, P) in [0, 1] of one kind of unit that are on in each block, at each of P timesteps."""

    title: str
    values: Array


def heat_maps(bundle: Bundle, points: int) -> list[HeatMap]:
    """Compute maps of heads, groups and, with token routers, kept tokens over equal cells of the range of t."""
    widths, stats = bundle.widths, bundle.token_stats
    timesteps = cells(bundle, points)
    rows = [widths.row(t) for t in timesteps]
    maps = [
        HeatMap(title="attention heads", values=widths.heads[rows].mean(axis=-1).T),
        HeatMap(title="MLP groups", values=widths.groups[rows].mean(axis=-1).T),
    ]
    if stats is not None:
        maps.append(HeatMap(title="MLP tokens", values=stats.mean_fraction(timesteps).T))
    return maps


def cells(bundle: Bundle, points: int) -> list[float]:
    """Return midpoints of ``points`` equal cells, in the order in which sampling visits them: noise first."""
    noise, data = bundle.manifest.model.noise_to_data
    return [float(t) for t in noise + (np.arange(points) + 0.5) * (data - noise) / points]


def segment_of(bundle: Bundle, points: int) -> list[int]:
    """Return the index of the engine that serves each cell."""
    return [bundle.manifest.plan.segment_for(t) for t in cells(bundle, points)]


def color(value: float) -> tuple[int, int, int]:
    """Interpolate the color ramp at a value in [0, 1]."""
    channels = np.array(RAMP, dtype=float).T  # (3, R)
    red, green, blue = (round(np.interp(value * (len(RAMP) - 1), range(len(RAMP)), channel)) for channel in channels)
    return red, green, blue


def render_text(bundle: Bundle, points: int = 64, *, ascii_only: bool = False) -> Group:
    """Render the heat maps as text: one row per block, one column per cell of t."""
    shades, line = (ASCII_SHADES, "-") if ascii_only else (SHADES, "─")
    lines: list[Text] = []
    for heat_map in heat_maps(bundle, points):
        lines.append(Text(f"{heat_map.title}: {heat_map.values.mean():.0%} on", style="bold"))
        lines += [_text_row(f"{block:>7} ", row, shades) for block, row in enumerate(heat_map.values)]
    lines.append(Text(" " * 8 + _engine_ruler(segment_of(bundle, points), line), style="dim"))
    lines.append(Text(" " * 8 + f"{_axis(bundle)}; the numbers are engines", style="dim"))
    return Group(*lines)


def _text_row(label: str, values: Array, shades: str) -> Text:
    text = Text(label, style="dim")
    for value in values:
        shade = shades[round(value * (len(shades) - 1))]
        text.append(shade, style="rgb({},{},{})".format(*color(value)))
    return text


def _engine_ruler(segments: Sequence[int], line: str = "─") -> str:
    """Return a line with the number of each engine where its interval begins: ``0──────1──2───``."""
    ruler = [line] * len(segments)
    for place, segment in enumerate(segments):
        if place == 0 or segments[place - 1] != segment:
            label = str(segment)[: len(segments) - place]
            ruler[place : place + len(label)] = label
    return "".join(ruler)


def _axis(bundle: Bundle) -> str:
    noise, data = bundle.manifest.model.noise_to_data
    return f"t = {noise:g} (noise) to t = {data:g} (data)"


def render_image(bundle: Bundle, points: int = 96) -> Image.Image:
    """Render the heat maps as a picture, one panel per map, with a white line where the engine changes."""
    maps = heat_maps(bundle, points)
    depth = maps[0].values.shape[0]
    panel = LINE + depth * CELL + LINE // 2
    image = Image.new("RGB", (MARGIN + points * CELL + CELL, len(maps) * panel + 2 * LINE), "white")
    canvas = ImageDraw.Draw(image)
    segments = segment_of(bundle, points)
    for index, heat_map in enumerate(maps):
        top = index * panel + LINE
        canvas.text((MARGIN, top - LINE + 2), f"{heat_map.title}: {heat_map.values.mean():.0%} on", fill="black")
        image.paste(_cells_image(heat_map.values), (MARGIN, top))
        for block in range(0, depth, max(depth // 8, 1)):
            canvas.text((4, top + block * CELL), f"block {block}", fill="black", font_size=9)
        _mark_engines(canvas, segments, top, depth)
    legend = f"{_axis(bundle)}; dark is off, yellow is on, a white line is the next engine"
    canvas.text((MARGIN, len(maps) * panel + LINE // 2), legend, fill="black")
    return image


def _cells_image(values: Array) -> Image.Image:
    pixels = np.array([[color(value) for value in row] for row in values], dtype=np.uint8)  # (L, P, 3)
    return Image.fromarray(pixels).resize((pixels.shape[1] * CELL, pixels.shape[0] * CELL), Image.Resampling.NEAREST)


def _mark_engines(canvas: ImageDraw.ImageDraw, segments: Sequence[int], top: int, depth: int) -> None:
    for place in range(1, len(segments)):
        if segments[place] != segments[place - 1]:
            x = MARGIN + place * CELL
            canvas.line([(x, top), (x, top + depth * CELL - 1)], fill="white", width=2)
