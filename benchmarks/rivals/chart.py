"""The chart of all variants: distance against cost, one line each, with the spread over seeds as a band."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.quality import CONTROL
from benchmarks.rivals.tables import Row
from benchmarks.rivals.variants import CACHE_DIT, DENSE, DYNAMIC, DYNAMIC_REUSE, REUSE, WIDTHS, Variant
from dyexport.errors import missing_extras
from dyexport.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {
    DENSE: "#9a9a9a",
    CONTROL: "#111111",
    WIDTHS: "#e69f00",
    DYNAMIC: "#0072b2",
    REUSE: "#009e73",
    CACHE_DIT: "#cc79a7",
    DYNAMIC_REUSE: "#56b4e9",
}
"""Okabe and Ito's colors, which differ in lightness too."""
MARKERS = {DENSE: "s", CONTROL: "s", WIDTHS: "D", DYNAMIC: "o", REUSE: "^", CACHE_DIT: "v", DYNAMIC_REUSE: "P"}
STYLES = ("-", (0, (4, 2)), (0, (1, 1.5)))  # of variants of one color, in order
SIZE = (8.0, 5.0)  # inches, at 100 pixels


@missing_extras()
def save_chart(rows: Sequence[Row], path: Path, *, title: str, real: float | None) -> None:
    """Draw the Frechet distance over the cost as SVG; ``real`` is the distance of held-out real pictures.

    Filled markers are points that no other point beats in both. Raises ``MissingDependencyError`` without matplotlib.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    scored = [row for row in rows if row.frechet is not None]
    best = {id(row) for row in scored if not any(_beats(other, row) for other in scored)}
    with matplotlib.rc_context({"svg.hashsalt": "rivals", "font.size": 11}):
        figure = Figure(figsize=SIZE, dpi=100, layout="constrained")
        axes = figure.subplots()
        for variant in dict.fromkeys(row.variant for row in scored):
            line = sorted((row for row in scored if row.variant == variant), key=lambda row: row.cost)
            _draw(axes, variant, line, best, _style(variant, [row.variant for row in scored]))
        if real:
            axes.axhline(real, color="#777777", linewidth=0.8, linestyle=(0, (1, 3)), label="held-out real pictures")
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis, places in ((axes.xaxis, (1, 2, 5)), (axes.yaxis, (1, 1.5, 2, 3, 5, 7))):
            axis.set_major_locator(LogLocator(subs=places))
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_locator(NullLocator())
        axes.grid(color="#e4e4e4", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("FLOPs of one picture, in evaluations of the dense network")
        axes.set_ylabel("Frechet distance, lower is better")
        axes.set_title(title, loc="left", fontsize=11)
        axes.annotate(
            "filled: nothing is both cheaper and better", (0, 0), (4, 4), "axes fraction", "offset points", fontsize=8
        )
        axes.legend(frameon=False, fontsize=9, loc="upper right")
        with replacing(path) as partial:
            figure.savefig(partial, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})


def _beats(one: Row, other: Row) -> bool:
    """Return whether a row is at most as costly and as far as another, and less in one of the two."""
    if one.frechet is None or other.frechet is None:
        return False
    pairs = ((one.cost, other.cost), (one.frechet.mean, other.frechet.mean))
    return all(left <= right for left, right in pairs) and any(left < right for left, right in pairs)


def _style(variant: Variant, variants: Sequence[Variant]) -> Any:
    alike = list(dict.fromkeys(each for each in variants if each.name == variant.name))
    return STYLES[alike.index(variant) % len(STYLES)]


def _draw(axes: Axes, variant: Variant, line: Sequence[Row], best: set[int], style: Any) -> None:
    color = COLORS[variant.name]
    costs = [row.cost for row in line]
    spreads = [row.frechet for row in line if row.frechet is not None]
    axes.fill_between(
        costs, [each.low for each in spreads], [each.high for each in spreads], color=color, alpha=0.12, linewidth=0
    )
    means = [each.mean for each in spreads]
    axes.plot(costs, means, color=color, linestyle=style, linewidth=1.6, label=variant.label)
    for row, mean in zip(line, means, strict=True):
        face = color if id(row) in best else "white"
        axes.plot(row.cost, mean, MARKERS[variant.name], color=color, markerfacecolor=face, markersize=6)
