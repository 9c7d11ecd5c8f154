"""The width map in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.text import Text

from dyexport.report.width_map import Array, WidthMap, color

ASCII_SHADES = ".:+#@"
SHADES = "·░▒▓█"  # repeat the color, for terminals without colors


def render_text(widths: WidthMap, *, ascii_only: bool = False) -> Group:
    """Render heat maps as text: one row per block, one column per cell of t."""
    shades, line = (ASCII_SHADES, "-") if ascii_only else (SHADES, "─")
    lines: list[Text] = []
    for heat_map in widths.maps:
        lines.append(Text(heat_map.caption, style="bold"))
        lines += [_row(f"{block:>7} ", row, shades) for block, row in enumerate(heat_map.values)]
    lines.append(Text(" " * 8 + _engine_ruler(widths.segments, line), style="dim"))
    lines.append(Text(" " * 8 + f"{widths.axis}; the numbers are engines", style="dim"))
    return Group(*lines)


def _row(label: str, values: Array, shades: str) -> Text:
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
