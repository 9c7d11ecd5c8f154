"""Latency of each sampling step, as ``bench`` measured the engines."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from dyexport.bench.rows import DENSE as DENSE_ROW
from dyexport.bench.rows import BenchReport, Row
from dyexport.report.drawing import DENSE, Chart, canvas, engine_color, to_svg
from dyexport.report.figures.step_bars import step_bars
from dyexport.report.trajectory import Trajectory


def latency_chart(trajectory: Trajectory, report: BenchReport) -> Chart:
    """Draw the median time of each step's engine, and that of the dense network."""
    from matplotlib.patches import Patch

    first = report.headline
    rows = {segment_of(row): row for row in report.rows if _same_case(row, first) and row.segment is not None}
    seconds = [rows[step.segment].timing.p50 * 1e3 for step in trajectory.steps]
    dense = next((row for row in report.rows if _same_case(row, first) and row.variant == DENSE_ROW), None)
    level = None if dense is None else dense.timing.p50 * 1e3
    with canvas(2.5) as (figure, axes):
        step_bars(axes, trajectory, seconds)
        shown: dict[str, Any] = {"engine": Patch(color=engine_color(trajectory.steps[0].segment))}
        if level is not None:
            shown[f"dense, {level:.3g} ms"] = axes.axhline(level, color=DENSE, linewidth=1.4, linestyle=(0, (5, 3)))
        axes.set_ylim(0, max(*seconds, level or 0) * 1.25)
        axes.legend(shown.values(), shown, ncols=2, loc="upper left", borderaxespad=0)
        axes.set_ylabel("milliseconds")
        compared = "" if level is None else f", the dense network {level:.3g} ms"
        alt = f"Steps take {min(seconds):.3g} to {max(seconds):.3g} ms, mean {fmean(seconds):.3g} ms{compared}."
        return Chart(
            title="Latency of each step",
            svg=to_svg(figure, "latency", alt),
            alt=alt,
            caption=f"Median of {first.calls} calls, {case_of(first)}, on {report.environment.device_name}. "
            "A step includes its share of the conditioning.",
        )


def segment_of(row: Row) -> int:
    """Return the index of the engine of a row."""
    return int(row.variant.removeprefix("segment "))


def case_of(row: Row) -> str:
    """Return what was run: target, batch and size."""
    size = "" if row.size is None else f", {row.size[0]} x {row.size[1]} pixels"
    return f"target {row.target}, batch {row.batch}{size}"


def _same_case(row: Row, first: Row) -> bool:
    return (row.target, row.batch, row.size, row.unit) == (first.target, first.batch, first.size, first.unit)
