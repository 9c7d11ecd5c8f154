"""Speed against quality: one point for each network that ``eval`` scored."""

from __future__ import annotations

from dyexport.bench.rows import BUNDLE
from dyexport.report.drawing import DENSE, DYNAMIC, MUTED, OTHER, Chart, canvas, to_svg
from dyexport.report.measurements import Evaluation

COLORS = {"dense": DENSE, **dict.fromkeys(BUNDLE, DYNAMIC)}
MARKERS = {"dense": "s", **dict.fromkeys(BUNDLE, "o")}


def quality_chart(evaluation: Evaluation, speedup: float | None, flops_ratio: float) -> Chart | None:
    """Draw Frechet distances over the speed-up that was measured, or else over FLOPs saved.

    Networks other than the bundle have the dense network's cost. None without distances.
    """
    if not evaluation.qualities:
        return None
    measured = speedup is not None
    gain = speedup if speedup is not None else 1 / flops_ratio
    with canvas(2.7) as (figure, axes):
        for quality in evaluation.qualities:
            place = gain if quality.name in BUNDLE else 1.0
            spread = [[quality.frechet - quality.low], [quality.high - quality.frechet]]
            color = COLORS.get(quality.name, OTHER)
            axes.errorbar(
                place, quality.frechet, yerr=spread, fmt=MARKERS.get(quality.name, "D"), color=color, capsize=3
            )
            axes.annotate(
                f"{quality.name}, {quality.frechet:.3f}",
                (place, quality.frechet),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
            )
        if evaluation.real is not None:
            axes.axhline(evaluation.real, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
            axes.text(
                1,
                evaluation.real,
                f"held-out real pictures, {evaluation.real:.3f}",
                transform=axes.get_yaxis_transform(),
                va="bottom",
                ha="right",
                color=MUTED,
            )
        axes.set_xlim(0.8, gain * 1.45)
        tops = [quality.high for quality in evaluation.qualities] + (
            [] if evaluation.real is None else [evaluation.real]
        )
        axes.set_ylim(0, max(tops) * 1.2)
        axes.set_xlabel("times faster than dense, measured" if measured else "times fewer FLOPs than dense")
        axes.set_ylabel("Frechet distance")
        axes.grid()
        axes.locator_params(axis="x", nbins=5)
        axes.tick_params(length=0)
        alt = "; ".join(f"{quality.name}: Frechet distance {quality.frechet:.3f}" for quality in evaluation.qualities)
        seeds = max(quality.seeds for quality in evaluation.qualities)
        return Chart(
            title="Speed against quality",
            svg=to_svg(figure, "quality", alt),
            alt=alt,
            caption=f"Lower is better. {_features(evaluation)}{evaluation.samples} samples of each network, "
            + (f"{seeds} seeds; bars from the best to the worst." if seeds > 1 else "one seed."),
        )


def _features(evaluation: Evaluation) -> str:
    return "" if evaluation.features is None else f"Features: {evaluation.features}. "
