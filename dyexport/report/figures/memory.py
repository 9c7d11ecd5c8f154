"""Memory that the bundle and its dense network take, as ``bench`` measured them."""

from __future__ import annotations

from dyexport.bench.rows import BenchReport, Memory, Row
from dyexport.report.drawing import DENSE, DYNAMIC, Chart, canvas, to_svg
from dyexport.report.tables import megabytes

KINDS = (
    ("resident_bytes", ""),
    ("shared_bytes", ", shared weights"),
    ("device_bytes", ", GPU"),
    ("torch_device_bytes", ", GPU by torch"),
)


def memory_chart(report: BenchReport) -> Chart | None:
    """Draw a bar for each measurement; None if there is none."""
    bars = [
        (f"{row.variant}{suffix}", count, DENSE if row.variant == "dense" else DYNAMIC)
        for row in _measured(report)
        for name, suffix in KINDS
        if (count := getattr(row.memory, name)) is not None and not _repeated(row.memory, name)
    ]
    if not bars:
        return None
    with canvas(len(bars) * 0.36 + 0.5) as (figure, axes):
        names, counts, colors = zip(*bars, strict=True)
        axes.barh(range(len(bars)), counts, height=0.7, color=colors)
        for place, count in enumerate(counts):
            axes.annotate(megabytes(count), (count, place), xytext=(5, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(bars)), labels=names)
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.set_xlim(0, max(counts) * 1.25)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(length=0)
        alt = "; ".join(f"{name}: {megabytes(count)}" for name, count, _ in bars)
        return Chart(
            title="Memory",
            svg=to_svg(figure, "memory", alt),
            alt=alt,
            caption="What a fresh process grows by when each engine has run once: weights and activations.",
        )


def _measured(report: BenchReport) -> list[Row]:
    first = report.headline
    return [
        row for row in report.rows if row.memory is not None and (row.target, row.batch) == (first.target, first.batch)
    ]


def _repeated(memory: Memory | None, name: str) -> bool:
    """Return True for the memory with shared weights of engines that share them anyway."""
    return memory is not None and name == "shared_bytes" and memory.shared_bytes == memory.resident_bytes
