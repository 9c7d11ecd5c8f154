"""The engines of one trajectory: which serves which sampling step."""

from __future__ import annotations

from dyexport.report.drawing import Chart, canvas, engine_color, to_svg
from dyexport.report.trajectory import Step, Trajectory

ROW = 0.26  # inches of an engine


def timeline_chart(trajectory: Trajectory, engines: int) -> Chart:
    """Draw a bar for each run of steps, engines from top to bottom."""
    runs = runs_of(trajectory.steps)
    count = len(trajectory.steps)
    with canvas(engines * ROW + 0.95) as (figure, axes):
        for first, last in runs:
            axes.broken_barh(
                [(first.index, last.index - first.index + 1)],
                (first.segment - 0.38, 0.76),
                facecolor=engine_color(first.segment),
            )
        axes.set_xlim(0, count)
        axes.set_ylim(engines - 0.45, -0.55)
        axes.set_yticks(range(engines), labels=[f"engine {index}" for index in range(engines)])
        axes.set_xlabel(f"sampling step, of {count}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="x")
        axes.tick_params(length=0)
        alt = "; ".join(f"steps {a.index + 1} to {b.index + 1}: engine {a.segment}" for a, b in runs)
        used = len({step.segment for step in trajectory.steps})
        return Chart(
            title="The engine of each step",
            svg=to_svg(figure, "timeline", alt),
            alt=alt,
            caption=f"{trajectory.scheduler}, {count} steps: {used} of {engines} engines run, with "
            f"{trajectory.switches} switches.",
        )


def runs_of(steps: tuple[Step, ...]) -> list[tuple[Step, Step]]:
    """Return the first and the last step of each run of steps on one engine."""
    runs: list[tuple[Step, Step]] = []
    for step in steps:
        if runs and runs[-1][1].segment == step.segment:
            runs[-1] = (runs[-1][0], step)
        else:
            runs.append((step, step))
    return runs
