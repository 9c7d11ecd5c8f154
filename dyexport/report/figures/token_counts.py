"""Kept tokens over t, from the statistics that calibration measured."""

from __future__ import annotations

import numpy as np

from dyexport.bundle.reader import Bundle
from dyexport.report.drawing import DYNAMIC, Chart, canvas, mark_engines, to_svg

POINTS = 128


def token_counts_chart(bundle: Bundle) -> Chart | None:
    """Draw the share of tokens that MLPs keep: mean over blocks, and the blocks that keep least and most."""
    stats = bundle.token_stats
    if stats is None:
        return None
    noise, data = bundle.manifest.model.noise_to_data
    points = np.linspace(noise, data, POINTS)
    kept = stats.mean_fraction(points)  # (P, L)
    with canvas(2.4) as (figure, axes):
        axes.fill_between(points, kept.min(axis=1), kept.max(axis=1), color=DYNAMIC, alpha=0.2, linewidth=0)
        axes.plot(points, kept.mean(axis=1), color=DYNAMIC, linewidth=1.8)
        mark_engines(axes, [segment.start for segment in bundle.manifest.plan.segments[1:]])
        axes.set_xlim(noise, data)
        axes.set_ylim(0, 1.05)
        axes.set_yticks([0, 0.5, 1], labels=["0", "50 %", "100 %"])
        axes.set_xlabel(f"t, from noise ({noise:g}) to data ({data:g})")
        axes.set_ylabel("tokens kept")
        axes.grid(axis="y")
        axes.tick_params(length=0)
        alt = (
            f"MLPs keep {kept.mean():.0%} of the tokens on average; single blocks {kept.min():.0%} to {kept.max():.0%}."
        )
        return Chart(
            title="Tokens kept",
            svg=to_svg(figure, "tokens", alt),
            alt=alt,
            caption="Line: the mean over blocks. Area: from the block that keeps least to the one that keeps most, "
            "measured on calibration inputs. Dashed: the next engine.",
        )
