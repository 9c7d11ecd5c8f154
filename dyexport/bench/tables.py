"""The report of ``dyexport bench`` as tables in a terminal, and as JSON, Markdown or CSV in a file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dyexport.bench.environment import Conditions
from dyexport.bench.report import Rows, as_markdown, as_table, megabytes
from dyexport.bench.rows import CONDITIONING, BenchReport, Row, payload
from dyexport.bench.statistics import Ratio
from dyexport.files import write_atomically

Column = tuple[str, Callable[[Row], str]]


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.1f}"


def _size(row: Row) -> str:
    return "" if row.size is None else "{}x{}".format(*row.size)


def _ratio(value: Ratio | None) -> str:
    return "" if value is None else str(value)


def _bytes(count: int | None) -> str:
    return "" if count is None else megabytes(count)


def _parts(row: Row) -> str:
    return ", ".join(f"{name} {_milliseconds(seconds)}" for name, seconds in (row.parts or {}).items())


COLUMNS: tuple[Column, ...] = (
    ("target", lambda row: row.target),
    ("variant", lambda row: row.variant),
    ("call", lambda row: row.unit),
    ("batch", lambda row: str(row.batch)),
    ("size", _size),
    ("p25 ms", lambda row: _milliseconds(row.timing.p25)),
    ("p50 ms", lambda row: _milliseconds(row.timing.p50)),
    ("p90 ms", lambda row: _milliseconds(row.timing.p90)),
    ("p99 ms", lambda row: _milliseconds(row.timing.p99)),
    ("first ms", lambda row: _milliseconds(row.first_call)),
    ("samples/s", lambda row: f"{row.samples_per_second:.3g}"),
    ("over dense", lambda row: _ratio(row.over_dense)),
    ("over torch.compile", lambda row: _ratio(row.over_compiled)),
    ("over eager", lambda row: _ratio(row.over_eager)),
    ("resident", lambda row: "" if row.memory is None else _bytes(row.memory.resident_bytes)),
    ("with shared weights", lambda row: "" if row.memory is None else _bytes(row.memory.shared_bytes)),
    ("on the GPU", lambda row: "" if row.memory is None else _bytes(row.memory.device_bytes)),
    ("J/sample", lambda row: "" if row.energy.joules is None else f"{row.energy.joules:.3g}"),
    ("of it, ms", _parts),
)
TIMES = ("variant", "call", "p25 ms", "p50 ms", "p90 ms", "p99 ms", "first ms", "samples/s", "of it, ms")
CASE = ("target", "batch", "size")
OF_ENGINES: tuple[Column, ...] = (
    ("engine", lambda row: row.variant.removeprefix("segment ")),
    ("t", lambda row: "" if row.segment is None else f"[{row.segment.start:.3g}, {row.segment.end:.3g})"),
    ("of t", lambda row: "" if row.segment is None else f"{row.segment.share:.0%}"),
    ("heads", lambda row: "" if row.segment is None else f"{row.segment.heads:.0%}"),
    ("groups", lambda row: "" if row.segment is None else f"{row.segment.groups:.0%}"),
    ("tokens", lambda row: "" if row.segment is None else f"{row.segment.tokens:.0%}"),
)


def _named(*names: str) -> tuple[Column, ...]:
    return tuple(column for column in COLUMNS if column[0] in names)


TIME_COLUMNS = _named(*CASE, *TIMES)
COST_COLUMNS = tuple(column for column in COLUMNS if column[0] not in TIMES or column[0] in ("variant", "call"))
ENGINE_COLUMNS = (*_named(*CASE), *OF_ENGINES, *_named("p50 ms", "first ms", "over dense"))


def filled(columns: Sequence[Column], rows: Sequence[Row]) -> tuple[tuple[str, ...], Rows]:
    """Return the header and the cells of the columns that are not empty in every row."""
    cells = [(name, [text(row) for row in rows]) for name, text in columns]
    kept = [(name, column) for name, column in cells if any(column)]
    return tuple(name for name, _ in kept), list(zip(*(column for _, column in kept), strict=True))


def narrow_table(title: str, columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    """Return a table whose title says what is the same in all rows: batch and size."""
    same = {name: text(rows[0]) for name, text in columns if name in CASE and len({text(row) for row in rows}) == 1}
    shown = "".join(f", {name} {value}" for name, value in same.items() if value)
    table = as_table(title + shown, *filled([column for column in columns if column[0] not in same], rows))
    table.box, table.collapse_padding, table.pad_edge = SIMPLE_HEAD, True, False
    for column in table.columns:
        column.no_wrap = column.header in ("target", "variant", "call")  # numbers may fold, names are read
    return table


def engine_rows(report: BenchReport) -> list[Row]:
    return [row for row in report.rows if row.segment is not None]


def variant_rows(report: BenchReport) -> list[Row]:
    return [row for row in report.rows if row.segment is None]


def fact_rows(report: BenchReport) -> Rows:
    """Return what is measured once, and what it was measured on."""
    machine = report.environment
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items() if version is not None)
    whole = [row for row in variant_rows(report) if row.variant != CONDITIONING]
    reasons = {row.energy.reason for row in whole if row.energy.reason is not None}
    gpu = {row.memory.device_reason for row in report.rows if row.memory is not None and row.memory.device_reason}
    overheads = report.switch_overhead.items()
    return [
        ("lambda as run (attention + MLP)", f"{report.flops_ratio:.3f}"),
        ("whole-network FLOPs ratio", f"{report.network_flops_ratio:.3f}"),
        ("FLOPs ratio the engines execute", f"{report.executed_flops_ratio:.3f}"),
        *(
            [("realized (speed-up over dense x whole-network ratio)", _realized(report))]
            if report.headline.over_dense is not None
            else []
        ),
        *(
            (
                f"switching engines of {target}, share of {report.steps} steps",
                "not measured" if s is None else f"{s:.2%}",
            )
            for target, s in overheads
        ),
        ("CPU time taken by other processes", "unknown" if report.others is None else f"{report.others:.0%}"),
        ("before timing", _conditions(report.before)),
        ("after timing", _conditions(report.after)),
        *(("energy", reason) for reason in sorted(reasons)),
        *(("memory on the GPU", reason) for reason in sorted(gpu)),
        ("device", f"{machine.device_name} ({machine.device}), {machine.threads} CPU threads"),
        ("CPU", machine.cpu),
        ("software", f"Python {machine.python}, {versions}, driver {machine.driver or 'none'}"),
    ]


def _realized(report: BenchReport) -> str:
    return "not trusted" if report.realized is None else f"{report.realized:.2f}"


def _conditions(conditions: Conditions) -> str:
    values = {
        "{:.0f} C": conditions.celsius,
        "CPU {:.0f} MHz": conditions.cpu_mhz,
        "GPU {:.0f} MHz": conditions.gpu_mhz,
        "GPU memory {:.0f} MHz": conditions.memory_mhz,
    }
    return ", ".join(text.format(value) for text, value in values.items() if value is not None) or "no sensors"


def bench_tables(report: BenchReport) -> list[Table]:
    rows = variant_rows(report)
    return [
        narrow_table("Engines", ENGINE_COLUMNS, engine_rows(report)),
        narrow_table(f"Time of one call of {report.model}", TIME_COLUMNS, rows),
        narrow_table("Speed-up, memory and energy", COST_COLUMNS, [row for row in rows if row.variant != CONDITIONING]),
        pairs_table("Measured in one run", fact_rows(report)),
    ]


def pairs_table(title: str, rows: Rows) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    for row in rows:
        table.add_row(*row)
    return table


def bench_markdown(report: BenchReport) -> str:
    """Return the tables, with the warnings above them."""
    warnings = "".join(f"> Warning: {warning}.\n\n" for warning in report.warnings)
    parts = (
        filled(COLUMNS, variant_rows(report)),
        filled(ENGINE_COLUMNS, engine_rows(report)),
        (("measured in one run", "value"), fact_rows(report)),
    )
    return f"# {report.model}\n\n{warnings}" + "\n".join(as_markdown(*part) for part in parts)


def bench_csv(report: BenchReport) -> str:
    """Return one line per row, in SI units: seconds, bytes, joules. What was not measured is empty."""
    text = io.StringIO()
    records = [_record(report, row) for row in report.rows]
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _record(report: BenchReport, row: Row) -> dict[str, object]:
    ratios = {"over_dense": row.over_dense, "over_torch_compile": row.over_compiled, "over_eager": row.over_eager}
    fields = ("resident_bytes", "shared_bytes", "device_bytes")
    return {
        "model": report.model,
        "device": report.environment.device_name,
        "target": row.target,
        "variant": row.variant,
        "call": row.unit,
        "batch": row.batch,
        "size": _size(row),
        **{name: getattr(row.timing, name) for name in ("p25", "p50", "p90", "p99")},
        "calls": row.calls,
        "first_call": row.first_call,
        "samples_per_second": row.samples_per_second,
        **{name: None if value is None else value.value for name, value in ratios.items()},
        **{f"{name}_low": None if value is None else value.low for name, value in ratios.items()},
        **{f"{name}_high": None if value is None else value.high for name, value in ratios.items()},
        **{name: None if row.memory is None else getattr(row.memory, name) for name in fields},
        "joules_per_sample": row.energy.joules,
        "t_start": None if row.segment is None else row.segment.start,
        "t_end": None if row.segment is None else row.segment.end,
    }


def save_report(report: BenchReport, path: Path) -> None:
    """Write a report as JSON, Markdown or CSV, by the suffix of the file. Raises ``StorageError``."""
    texts = {
        ".json": lambda: json.dumps(payload(report), indent=2, allow_nan=False) + "\n",
        ".md": lambda: bench_markdown(report),
        ".csv": lambda: bench_csv(report),
    }
    write_atomically(path, texts[path.suffix.lower()]().encode())
