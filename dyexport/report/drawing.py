"""Charts as inline SVG: matplotlib draws them, and the page's style sheet colors them, in light and in dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, DYNAMIC = "#010203", "#040506", "#070809", "#0a0b0c"
"""Placeholders for the page's colors of text, of secondary text, of lines and of the bundle, in either theme."""
THEME = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)", DYNAMIC: "var(--accent)"}

DENSE, OTHER = "#8a8f98", "#e69f00"
ENGINES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a100", "#6f6f9d")
"""Okabe and Ito's colors, which differ in lightness too; engines take them in turn."""

WIDTH = 5.2  # inches, of every chart: text has one size in all of them
DPI = 100
FONT = 11.0  # points; 9 pixels on a phone of 360


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart: inline SVG, what it shows in words for those who cannot see it, and the line under it."""

    title: str
    svg: str
    alt: str
    caption: str


def engine_color(index: int) -> str:
    return ENGINES[index % len(ENGINES)]


@contextmanager
def canvas(height: float, *, rows: int = 1, **options: Any) -> Iterator[tuple[Figure, Any]]:
    """Yield a figure of the page's width and its axes, one or an array of ``rows``."""
    import matplotlib
    from matplotlib.figure import Figure as MakeFigure

    style: Any = {  # its keys are literals in matplotlib's stubs
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "dyexport",  # the same bytes for the same bundle
        "font.size": FONT,
        "axes.titlesize": FONT,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": GRID,
        "axes.labelcolor": MUTED,
        "axes.titlecolor": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "text.color": INK,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "legend.fontsize": FONT - 1,
        "figure.constrained_layout.use": True,
    }
    with matplotlib.rc_context(style):
        figure = MakeFigure(figsize=(WIDTH, height), dpi=DPI)
        yield figure, figure.subplots(rows, **options)


def to_svg(figure: Figure, name: str, alt: str) -> str:
    """Return a figure as an SVG element that takes its colors and its font from the page.

    ``name`` keeps its identifiers apart from those of other charts on the page.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<g id=\"[^\"]*\">", "<g>", text)
    text = re.sub(r"\b(id=\"|url\(#|href=\"#)", rf"\g<1>{name}-", text)
    text = re.sub(r"font: (?:(\d+) )?([\d.]+px) [^;\"]*", _font, text)
    for placeholder, color in THEME.items():
        text = text.replace(placeholder, color)
    size = re.search(r"viewBox=\"0 0 [\d.]+ [\d.]+\"", text)
    assert size is not None, "matplotlib writes the size"
    label = _escaped(alt)
    return f'<svg class="chart" role="img" aria-label="{label}" {size[0]}' + text[text.index(">") :].replace(
        ">", f' xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"><title>{label}</title>', 1
    )


def _font(match: re.Match[str]) -> str:
    weight = "" if match[1] is None else f"; font-weight: {match[1]}"
    return f"font-size: {match[2]}{weight}"


def _escaped(text: str) -> str:
    from xml.sax.saxutils import escape

    return escape(text, {'"': "&quot;"})


def mark_engines(axes: Axes, boundaries: list[float], **style: Any) -> None:
    """Draw a line at each change of engine."""
    for place in boundaries:
        axes.axvline(place, **{"color": MUTED, "linewidth": 0.8, "linestyle": (0, (3, 3)), **style})
