"""Distance of the bundle's latents to the dense network's after each step, as ``eval`` measured it."""

from __future__ import annotations

from dyexport.evaluation.report import Drift, EvalReport, PairedScores
from dyexport.report.drawing import DYNAMIC, MUTED, Chart, canvas, to_svg


def drift_chart(report: EvalReport) -> Chart | None:
    """Draw the mean and the largest distance over samples; None for a bundle without the dense network."""
    from matplotlib.ticker import MaxNLocator

    drift = report.drift
    if drift is None:
        return None
    places = range(1, len(drift.mean) + 1)
    with canvas(2.5) as (figure, axes):
        axes.plot(places, drift.largest, color=MUTED, linewidth=1.2, linestyle=(0, (4, 2)), label="largest")
        axes.plot(places, drift.mean, color=DYNAMIC, linewidth=1.8, label="mean")
        axes.set_ylim(0, max(drift.largest) * 1.25 or 1)
        axes.set_xlabel("sampling step")
        axes.set_ylabel("relative distance")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
        axes.tick_params(length=0)
        axes.legend(ncols=2, loc="upper left", borderaxespad=0)
        alt = f"After the last step the distance is {drift.mean[-1]:.1%} in the mean, {drift.largest[-1]:.1%} at most."
        return Chart(
            title="Drift from the dense network",
            svg=to_svg(figure, "drift", alt),
            alt=alt,
            caption=_caption(drift, report.paired),
        )


def _caption(drift: Drift, paired: PairedScores | None) -> str:
    shown = f"L2 distance of latents from equal noise, over the dense network's norm; {drift.samples} samples."
    if paired is None or paired.psnr is None:
        return shown
    ssim = "" if paired.ssim is None else f", SSIM {paired.ssim:.3f}"
    return f"{shown} Finished {paired.unit}: PSNR {paired.psnr:.1f} dB{ssim}."
