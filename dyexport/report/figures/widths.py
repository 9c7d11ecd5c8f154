"""The width map: shares of heads, groups and tokens over t and depth."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from dyexport.report.drawing import INK, MUTED, Chart, canvas, to_svg
from dyexport.report.width_map import RAMP, HeatMap, WidthMap

ROW = 0.17  # inches of a block
LEAST, MOST = 0.9, 2.6  # inches of a panel
TITLE = "Width over the trajectory"


def widths_chart(widths: WidthMap) -> Chart:
    """Draw one panel for each kind of unit, blocks from top to bottom, with the engines below."""
    panel = min(max(widths.depth * ROW, LEAST), MOST)
    count = len(widths.maps)
    with canvas(count * (panel + 0.42) + 0.75, rows=count, sharex=True, squeeze=False) as (figure, grid):
        axes = grid[:, 0]
        images = [_panel(axis, widths, heat_map) for axis, heat_map in zip(axes, widths.maps, strict=True)]
        _number_engines(axes[0], widths)
        axes[-1].set_xlabel(f"t, from noise ({widths.noise:g}) to data ({widths.data:g})")
        bar = figure.colorbar(images[0], ax=list(axes), location="bottom", fraction=0.04, aspect=40, pad=0.02)
        bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0 %", "25 %", "50 %", "75 %", "100 % on"])
        bar.outline.set_visible(False)
        return Chart(
            title=TITLE,
            svg=to_svg(figure, "widths", _alt(widths)),
            alt=_alt(widths),
            caption="Each cell is the share of a block that is on at that t. White lines are where the engine changes; "
            "the numbers above are engines.",
        )


def _panel(axis: Any, widths: WidthMap, heat_map: HeatMap) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    ramp = LinearSegmentedColormap.from_list("widths", [tuple(part / 255 for part in color) for color in RAMP])
    points = len(widths.timesteps)
    extent = (0, points, widths.depth - 0.5, -0.5)
    image = axis.imshow(heat_map.values, cmap=ramp, vmin=0, vmax=1, aspect="auto", interpolation="none", extent=extent)
    axis.set_title(heat_map.caption, pad=16 if heat_map is widths.maps[0] else 4)
    axis.set_ylabel("block")
    step = max(widths.depth // 4, 1)
    axis.set_yticks(range(0, widths.depth, step))
    quarters = [0, points / 4, points / 2, 3 * points / 4, points]
    span = widths.data - widths.noise
    axis.set_xticks(quarters, labels=[f"{widths.noise + span * place / points:g}" for place in quarters])
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    for place in widths.boundaries:
        axis.axvline(place, color="white", linewidth=1.4)
    return image


def _number_engines(axis: Any, widths: WidthMap) -> None:
    """Write the number of each engine above its interval."""
    edges = [0, *widths.boundaries, len(widths.timesteps)]
    for left, right in pairwise(edges):
        middle = (left + right) / 2
        axis.annotate(
            str(widths.segments[left]),
            (middle / edges[-1], 1),
            xycoords="axes fraction",
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            color=MUTED if right - left < 2 else INK,
            fontsize=9,
        )


def _alt(widths: WidthMap) -> str:
    shares = ", ".join(heat_map.caption for heat_map in widths.maps)
    engines = len(set(widths.segments))
    return f"Heat maps over t and depth. On average {shares}. {engines} engines share the range of t."
