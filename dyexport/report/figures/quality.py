"""Speed against quality: one point for each network that ``eval`` scored."""

from __future__ import annotations

from typing import Any

from dyexport.bench.rows import BUNDLE
from dyexport.evaluation.report import EvalReport, ModelScores
from dyexport.report.drawing import DENSE, DYNAMIC, MUTED, OTHER, Chart, canvas, to_svg

COLORS = {"dense": DENSE, **dict.fromkeys(BUNDLE, DYNAMIC)}
MARKERS = {"dense": "s", **dict.fromkeys(BUNDLE, "o")}


def quality_chart(report: EvalReport, speedup: float | None, flops_ratio: float) -> Chart | None:
    """Draw Frechet distances over the speed-up that was measured, or else over FLOPs saved.

    Networks other than the bundle have the dense network's cost. None without distances.
    """
    scored = {scores: distances for scores in report.models if (distances := distances_of(scores))}
    if not scored:
        return None
    gain = 1 / flops_ratio if speedup is None else speedup
    highest = max(max(distances) for distances in scored.values())
    with canvas(2.7) as (figure, axes):
        for scores, distances in scored.items():
            _point(axes, gain if scores.model in BUNDLE else 1.0, scores, distances)
        if report.frechet_real is not None:
            _line(axes, report.frechet_real)
        axes.set_xlim(0.8, gain * 1.45)
        axes.set_ylim(0, max(highest, report.frechet_real or 0) * 1.2)
        axes.set_xlabel("times fewer FLOPs than dense" if speedup is None else "times faster than dense, measured")
        axes.set_ylabel("Frechet distance")
        axes.grid()
        axes.locator_params(axis="x", nbins=5)
        axes.tick_params(length=0)
        alt = "; ".join(f"{scores.model}: Frechet distance {scores.frechet:.3f}" for scores in scored)
        seeds = len(report.seeds)
        return Chart(
            title="Speed against quality",
            svg=to_svg(figure, "quality", alt),
            alt=alt,
            caption=f"Lower is better. Features: {report.features}. {report.samples} samples of each network, "
            + (f"{seeds} seeds; bars from the best to the worst." if seeds > 1 else "one seed."),
        )


def distances_of(scores: ModelScores) -> list[float]:
    """Return the Frechet distance of each seed; none where samples were not compared with data."""
    return [seed.frechet for seed in scores.seeds if seed.frechet is not None]


def _point(axes: Any, place: float, scores: ModelScores, distances: list[float]) -> None:
    mean = sum(distances) / len(distances)
    spread = [[mean - min(distances)], [max(distances) - mean]]
    marker, color = MARKERS.get(scores.model, "D"), COLORS.get(scores.model, OTHER)
    axes.errorbar(place, mean, yerr=spread, fmt=marker, color=color, capsize=3)
    text = f"{scores.model}, {mean:.3f}"
    axes.annotate(text, (place, mean), xytext=(8, 0), textcoords="offset points", va="center")


def _line(axes: Any, distance: float) -> None:
    """Draw the distance of held-out real data, the score of a perfect model."""
    axes.axhline(distance, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
    text, right = f"held-out real data, {distance:.3f}", axes.get_yaxis_transform()
    axes.text(1, distance, text, transform=right, va="bottom", ha="right", color=MUTED)
