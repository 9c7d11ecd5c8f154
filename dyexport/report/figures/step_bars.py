"""Bars of the steps of a trajectory, in the colors of their engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dyexport.report.drawing import engine_color
from dyexport.report.trajectory import Trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CROWDED = 24  # steps from which on bars touch: gaps would flicker where the page is scaled


def step_bars(axes: Axes, trajectory: Trajectory, heights: Sequence[float]) -> None:
    """Draw one bar for each step, numbered from 1."""
    from matplotlib.ticker import MaxNLocator

    places = [step.index + 1 for step in trajectory.steps]
    colors = [engine_color(step.segment) for step in trajectory.steps]
    axes.bar(places, heights, width=0.84 if len(places) < CROWDED else 1.02, color=colors)
    axes.set_xlabel("sampling step")
    axes.set_xlim(0.2, len(places) + 0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
    axes.tick_params(length=0)
