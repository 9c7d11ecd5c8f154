"""Results of one run: JSON, Markdown and CSV, the chart, and the summary in the documentation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.quality import CONTROL, write_results
from benchmarks.rivals.chart import save_chart
from benchmarks.rivals.publish import DOCS, PAGES, Part, publish
from benchmarks.rivals.tables import Row, as_csv, markdown_table, summary
from benchmarks.rivals.timing import Timings
from benchmarks.rivals.variants import DYNAMIC, REUSE, WIDTHS
from dyexport.bench.pictures import save_png
from dyexport.errors import UsageError
from dyexport.evaluation.settings import SamplingConfig
from dyexport.files import write_atomically

BUSY = 0.05  # share of CPU time of other processes from which a table says so
SUMMARY_STEPS = (4, 8, 25)


@dataclass(frozen=True, kw_only=True)
class Report:
    """All rows, and how they were measured.

    ``made`` describes the machine and the command, ``remarks`` say what is missing. Without ``sampling`` there is no
    quality, and without ``pictures`` samples are no pictures.
    """

    model: str
    made: dict[str, Any]
    rows: Sequence[Row]
    remarks: Sequence[str]
    timings: Timings | None
    sampling: SamplingConfig | None = None
    repeats: int = 0
    real: float | None = None
    pictures: Image.Image | None = None
    caption: str = ""

    @property
    def stem(self) -> str:
        return f"rivals_{self.model}" + ("" if self.sampling else "_times")

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        sampling = (
            None if self.sampling is None else {"samples": self.sampling.samples, "guidance": self.sampling.guidance}
        )
        timings = self.timings
        return {
            "model": self.model,
            **self.made,
            "sampling": sampling,
            "repeats": self.repeats,
            "frechet_real": self.real,
            "timing": None if timings is None else {"batch": timings.batch, "others": timings.others},
            "remarks": list(self.remarks),
            "rows": [row.as_json() for row in self.rows],
        }

    def markdown(self) -> str:
        """Return the table with a legend."""
        return f"{self._legend()}\n\n{markdown_table(self.rows)}" + "".join(f"\n- {each}." for each in self.remarks)

    def _legend(self) -> str:
        parts = [f"`{self.made['command']}`\n\n{self.model} on {self.made['cpu']}, threads: {self.made['threads']}."]
        if self.sampling is not None:
            real = "" if self.real is None else f"; held-out real pictures score {self.real:.3f}"
            parts.append(
                f"Frechet distance of {self.repeats} x {self.sampling.samples} samples without guidance{real}:\n"
                "mean, and extremes over training seeds, or over noise where there is one model.\n"
                "PSNR is to the dense model at the same steps and noise."
            )
        parts.append("`reuse` is TeaCache's rule on whole outputs; `cache-dit` runs on diffusers' module, eager.")
        parts.append("Numbers of variants are lambda, and after + the share of evaluations that a cache computes.")
        parts.append("Cost and time are of one picture, in evaluations of the dense ONNX graph of the same run.")
        if self.timings is not None:
            parts.append(f"Timed at batch {self.timings.batch}.")
            if (self.timings.others or 0) > BUSY:
                parts.append(f"Other processes took {self.timings.others:.0%} of CPU time meanwhile.")
        return "\n".join(parts)

    def summary(self) -> str:
        """Return the table for README and docs, with the command that trains, times and scores all of it."""
        budgets = {row.variant.budget for row in self.rows if row.variant.budget is not None}
        steps = sorted({row.steps for row in self.rows}.intersection(SUMMARY_STEPS))
        table = summary(self.rows, steps, sorted(budgets))
        assert self.sampling is not None, "the summary is of quality"
        samples = f"{self.repeats} x {self.sampling.samples} samples"
        spreads = any(len(row.seeds) > 1 for row in self.rows)
        seeds = "mean and extremes over training seeds" if spreads else "one training seed"
        timed = any(row.time is not None for row in self.rows)
        return (
            f"{table}\n`{self.model}`, {samples}: Frechet distance, {seeds}.\n"
            f"{'Cost and time' if timed else 'Cost'} of a picture in evaluations of the dense network. "
            f"Made by `{self._whole_command()}`."
        )

    def _whole_command(self) -> str:
        """Return the command without the options that keep what earlier runs trained and timed."""
        return re.sub(r" --no-(train|time)\b", "", str(self.made["command"]))


def write(report: Report, results: Path) -> None:
    """Write the tables, the chart where something is scored, and the pictures."""
    file = results / f"{report.stem}.json"
    write_results(file, report.as_json(), report.markdown())
    write_atomically(file.with_suffix(".csv"), as_csv(report.rows).encode())
    if any(row.frechet is not None for row in report.rows):
        title = f"{report.model}: what a picture costs and how good it is"
        save_chart(report.rows, results / f"{report.stem}.svg", title=title, real=report.real)
    if report.pictures is not None:
        save_png(report.pictures, results / f"{report.stem}.png")


def publish_summary(report: Report, results: Path, pages: Sequence[Path] = PAGES, docs: Path = DOCS) -> None:
    """Put the summary, the chart and the pictures, which are among the results, into README and docs.

    Raises ``UsageError`` for a page without a place for it, and for a report without quality or with missing seeds.
    """
    chart = docs / f"{report.stem}.svg"
    if report.sampling is None or not (results / chart.name).exists():
        raise UsageError("--publish is for quality, and nothing is scored; leave it out")
    there = {row.variant.name for row in report.rows}
    lacking = {row.variant.name for row in report.rows if row.missing} | ({CONTROL, WIDTHS, REUSE, DYNAMIC} - there)
    if lacking:
        raise UsageError(f"--publish needs every seed of {min(lacking)}; train what is missing, or leave it out")
    quality = f"Frechet distance of {report.model} and its rivals over the FLOPs of one picture"
    parts = [Part(f"rivals {report.model}", report.summary(), chart, quality)]
    if report.pictures is not None:
        pictures = docs / f"{report.stem}.png"
        parts.append(Part(f"pictures {report.model}", f"*{report.caption}*", pictures, f"Pictures by {report.model}"))
    publish(parts, pages)
    for part in parts:
        write_atomically(part.figure, (results / part.figure.name).read_bytes())
