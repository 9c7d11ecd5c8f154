"""Tables of all variants: means over training seeds, with their extremes."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from benchmarks.quality import CONTROL
from benchmarks.rivals.measure import Point
from benchmarks.rivals.timing import Timings
from benchmarks.rivals.variants import DENSE, DYNAMIC, REUSE, WIDTHS, Variant
from benchmarks.rivals.variants import equal_flops_steps as fewer
from dyexport.bench.report import as_markdown
from dyexport.bench.statistics import Ratio

HEADER = (
    "variant",
    "steps",
    "cost",
    "GFLOPs",
    "time",
    "Frechet distance",
    "class accuracy",
    "PSNR",
    "memory",
    "seeds",
)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean and extremes over training seeds; over repeats of noise where there is one model only."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(mean=fmean(values), low=min(values), high=max(values))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant at one number of steps.

    cost     of the network, in evaluations of the dense one
    time     in steps of the dense engine: a ratio that is None inside if it cannot be trusted; None if not timed
    memory   bytes that a process grows by when each engine has run once
    missing  seeds that are not trained
    """

    variant: Variant
    steps: int
    cost: float
    gflops: float
    time: Ratio | None
    frechet: Spread | None
    class_accuracy: Spread | None
    psnr: Spread | None
    memory: float | None
    seeds: tuple[int, ...]
    missing: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        return {"label": self.variant.label, **_plain(self)}


def _plain(value: Any) -> Any:
    """Return dataclasses as JSON values."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return list(value) if isinstance(value, tuple) else value


def rows_of(
    points: Sequence[Point],
    seeds: Sequence[int],
    *,
    dense_gflops: float,
    timings: Timings | None = None,
    memory: Mapping[tuple[str, int | None], int] | None = None,
) -> list[Row]:
    """Combine the seeds of each variant at each number of steps, in the order of the points.

    ``dense_gflops`` is one dense evaluation, ``memory`` bytes by the network whose engines run, and its seed.
    """
    groups: dict[tuple[Variant, int], list[Point]] = {}
    for point in points:
        groups.setdefault((point.variant, point.steps), []).append(point)
    return [_row(group, seeds, dense_gflops, timings, memory or {}) for group in groups.values()]


def _row(
    group: Sequence[Point],
    seeds: Sequence[int],
    dense_gflops: float,
    timings: Timings | None,
    memory: Mapping[tuple[str, int | None], int],
) -> Row:
    variant, steps = group[0].variant, group[0].steps
    cost = fmean(point.cost for point in group)
    there = [point.seed for point in group if point.seed is not None]
    networks = [(variant.engines, None if variant.engines == DENSE else point.seed) for point in group]
    sizes = [size for network in networks if (size := memory.get(network)) is not None]
    psnr = [point.psnr for point in group if point.psnr is not None]
    return Row(
        variant=variant,
        steps=steps,
        cost=cost,
        gflops=cost * dense_gflops,
        time=None if timings is None else timings.over_dense([point.parts for point in group], steps),
        frechet=_spread(group, lambda point: point.frechet),
        class_accuracy=_spread(group, lambda point: point.class_accuracy),
        psnr=Spread.of(psnr) if psnr else None,
        memory=fmean(sizes) if sizes else None,
        seeds=tuple(there),
        missing=tuple(seed for seed in seeds if seed not in there) if there else (),
    )


def _spread(group: Sequence[Point], of: Callable[[Point], Sequence[float | None]]) -> Spread | None:
    """Combine scores: the repeats of each seed are averaged, unless there is one model only."""
    repeats = [[value for value in of(point) if value is not None] for point in group]
    if not all(repeats):
        return None
    return Spread.of(repeats[0] if group[0].seed is None else [fmean(values) for values in repeats])


def markdown_table(rows: Sequence[Row]) -> str:
    """Return the table of all rows."""
    return as_markdown(HEADER, [cells(row) for row in rows])


def cells(row: Row) -> tuple[str, ...]:
    return (
        row.variant.label,
        str(row.steps),
        f"{row.cost:.2f}",
        f"{row.gflops:.3g}",
        time_text(row.time),
        "" if row.frechet is None else spread_text(row.frechet),
        "" if row.class_accuracy is None else f"{row.class_accuracy.mean:.1%}",
        "" if row.psnr is None else f"{row.psnr.mean:.1f} dB",
        "" if row.memory is None else f"{row.memory / 1e6:.1f} MB",
        seeds_text(row),
    )


def spread_text(spread: Spread, *, bold: bool = False) -> str:
    """Return the mean of distances, and the extremes where there is more than one."""
    mean = f"**{_digits(spread.mean)}**" if bold else _digits(spread.mean)
    return mean if spread.low == spread.high else f"{mean} ({_digits(spread.low)} to {_digits(spread.high)})"


def _digits(distance: float) -> str:
    return f"{distance:.3f}" if distance < 10 else f"{distance:.1f}"


def time_text(time: Ratio | None) -> str:
    """Return a time in steps of the dense engine."""
    if time is None:
        return ""
    return "not trusted" if time.value is None else f"{time.value:.2f}"


def seeds_text(row: Row) -> str:
    there = " ".join(map(str, row.seeds))
    return f"{there} (missing: {' '.join(map(str, row.missing))})" if row.missing else there


def as_csv(rows: Sequence[Row]) -> str:
    """Return the rows as CSV: means and extremes in columns of their own."""
    buffer = io.StringIO()
    flat = [_flat(row) for row in rows]
    writer = csv.DictWriter(buffer, list(flat[0]) if flat else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return buffer.getvalue()


def _flat(row: Row) -> dict[str, Any]:
    spreads = {
        f"{name}_{part}": "" if (spread := getattr(row, name)) is None else getattr(spread, part)
        for name in ("frechet", "class_accuracy", "psnr")
        for part in ("mean", "low", "high")
    }
    return {
        "variant": row.variant.name,
        "budget": row.variant.budget,
        "share": row.variant.share,
        "steps": row.steps,
        "cost": row.cost,
        "gflops": row.gflops,
        "time": None if row.time is None else row.time.value,
        **spreads,
        "memory": row.memory,
        "seeds": " ".join(map(str, row.seeds)),
        "missing": " ".join(map(str, row.missing)),
    }


def summary(rows: Sequence[Row], steps: Sequence[int], budgets: Sequence[float]) -> str:
    """Return four rows for each budget that answer "why not something else": what each scores, costs and takes.

    Fewer steps of the control are those of equal FLOPs. The best distance of each budget and number of steps is bold.
    """
    by_name = {(row.variant, row.steps): row for row in rows}
    body = []
    for budget in sorted(budgets, reverse=True):
        lines = {
            title: [by_name.get((variant, fewer(each, budget) if variant.name == CONTROL else each)) for each in steps]
            for title, variant in _summarized(rows, budget)
        }
        best = [_best([line[column] for line in lines.values()]) for column in range(len(steps))]
        body += [(title, *map(_summary_cell, line, best)) for title, line in lines.items()]
    return as_markdown(("", *(f"{count} steps" for count in steps)), body)


def _summarized(rows: Sequence[Row], budget: float) -> Iterator[tuple[str, Variant]]:
    """Yield titles and variants; of the caches the one that computes a share next to lambda."""
    yield f"as many FLOPs as lambda {budget:g}: fewer steps of the static model, trained as long", Variant(name=CONTROL)
    shares = {row.variant.share for row in rows if row.variant.name == REUSE and row.variant.share is not None}
    if shares:
        share = min(shares, key=lambda each: abs(each - budget))
        title = f"step cache on the static model: TeaCache's rule, {share:.0%} of outputs computed"
        yield title, Variant(name=REUSE, share=share)
    yield f"static slim network, lambda {budget:g}", Variant(name=WIDTHS, budget=budget)
    yield f"**dynamic, lambda {budget:g}**", Variant(name=DYNAMIC, budget=budget)


def _best(rows: Sequence[Row | None]) -> float | None:
    return min((row.frechet.mean for row in rows if row is not None and row.frechet is not None), default=None)


def _summary_cell(row: Row | None, best: float | None) -> str:
    if row is None or row.frechet is None:
        return ""
    time = "" if row.time is None or row.time.value is None else f", time {row.time.value:.1f}"
    return f"{spread_text(row.frechet, bold=row.frechet.mean == best)}, cost {row.cost:.1f}{time}"
