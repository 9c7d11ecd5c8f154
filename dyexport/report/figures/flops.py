"""FLOPs of each sampling step."""

from __future__ import annotations

from dyexport.report.costs import StepCosts
from dyexport.report.drawing import DENSE, INK, Chart, canvas, engine_color, to_svg
from dyexport.report.figures.step_bars import step_bars
from dyexport.report.trajectory import Trajectory


def flops_chart(trajectory: Trajectory, costs: StepCosts) -> Chart:
    """Draw a bar for each step in the color of its engine, and what the gates ask for as a line."""
    from matplotlib.patches import Patch

    with canvas(2.5) as (figure, axes):
        places = [step.index + 1 for step in trajectory.steps]
        step_bars(axes, trajectory, [cost.executed for cost in costs.steps])
        line = axes.step(places, [cost.gated for cost in costs.steps], where="mid", color=INK, linewidth=1.4)
        dense = axes.axhline(1, color=DENSE, linewidth=1.4, linestyle=(0, (5, 3)))
        axes.set_ylim(0, 1.22)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "25 %", "50 %", "75 %", "100 %"])
        axes.set_ylabel("of the dense FLOPs")
        shown = [Patch(color=engine_color(trajectory.steps[0].segment)), line[0], dense]
        axes.legend(
            shown, ["engine, as it runs", "gates at this t", "dense"], ncols=3, loc="upper left", borderaxespad=0
        )
        alt = (
            f"Bars of {len(places)} steps, from {min(c.executed for c in costs.steps):.0%} to "
            f"{max(c.executed for c in costs.steps):.0%} of the dense network's FLOPs; mean {costs.executed:.1%}."
        )
        return Chart(
            title="FLOPs of each step",
            svg=to_svg(figure, "flops", alt),
            alt=alt,
            caption=f"Mean over the trajectory: {costs.executed:.1%} of the dense network, which takes "
            f"{_giga(costs.dense)} multiply-adds a step. Bars have the colors of their engines.",
        )


def _giga(count: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g}"
