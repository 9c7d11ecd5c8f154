"""Tables of measurements: rich tables for the terminal, markdown for files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from dyexport.bundle.plan import Segment
from dyexport.bundle.reader import Bundle

Rows = list[tuple[str, ...]]


def as_table(title: str, header: Sequence[str], rows: Rows) -> Table:
    """Return a table with the first column left-aligned and the others right-aligned. Narrow terminals fold cells."""
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def as_markdown(header: Sequence[str], rows: Rows) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def inspect_table(bundle: Bundle) -> Table:
    """Return a table with one row per segment: the units and tokens in its engine."""
    manifest = bundle.manifest
    units = (bundle.widths.heads[0].size, bundle.widths.groups[0].size)
    rows = [(str(i), *_segment_row(bundle, segment, units)) for i, segment in enumerate(manifest.plan.segments)]
    plan = manifest.plan
    budgets = f" (budget {manifest.budget:g} of {', '.join(map(str, bundle.budgets))})" if manifest.budgets else ""
    title = (
        f"{manifest.model.name}{budgets}: lambda as run {plan.flops_ratio:.3f}, "
        f"whole network {plan.network_flops_ratio:.3f}, "
        f"as executed {plan.executed_flops_ratio:.3f}, {megabytes(plan.disk_bytes)} of weights "
        f"({manifest.model.number_formats}{', static widths' if manifest.widths == 'static' else ''})"
    )
    return as_table(title, ("engine", "t", "heads", "groups", "gates", "token path", "capacity"), rows)


def inspect_payload(bundle: Bundle) -> dict[str, Any]:
    """Return the contents of ``inspect --json``: those of ``inspect_table`` in full."""
    manifest = bundle.manifest
    plan = manifest.plan
    on = {"heads": bundle.widths.heads.mean(axis=-1), "groups": bundle.widths.groups.mean(axis=-1)}
    return {
        "model": manifest.model.name,
        "budget": manifest.budget,
        "budgets": list(bundle.budgets),
        "static": manifest.widths == "static",
        "precision": manifest.model.precision,
        "quantization": manifest.model.quantization,
        **plan.model_dump(mode="json", exclude={"segments"}),
        "segments": [
            {
                **segment.model_dump(mode="json", exclude={"heads", "groups"}),
                **_kept(segment),
                "gates": segment.gate_size,
            }
            for segment in plan.segments
        ],
        "widths": {
            "t": bundle.widths.grid.tolist(),
            **{name: shares.round(4).tolist() for name, shares in on.items()},
        },
        "metrics": dict(manifest.metrics),
        "targets": sorted({engine.target for engine in manifest.engines}),
        "bytes": sum(record.bytes for record in manifest.files.values()),
    }


def _kept(segment: Segment) -> dict[str, list[int]]:
    return {"heads": [len(kept) for kept in segment.heads], "groups": [len(kept) for kept in segment.groups]}


def _segment_row(bundle: Bundle, segment: Segment, units: tuple[int, int]) -> tuple[str, ...]:
    heads, groups = (sum(len(kept) for kept in blocks) for blocks in (segment.heads, segment.groups))
    paths = sorted(set(segment.token_paths))
    capacities = zip(segment.capacities, segment.token_paths, strict=True)
    limited = [capacity for capacity, path in capacities if path in ("capacity", "dynamic")]
    tokens = bundle.manifest.model.tokens
    capacity = f"{min(limited)}-{max(limited)} of {tokens}" if limited else "-"
    slots = f" + {segment.slot_buckets[0]}-{segment.slot_buckets[-1]}" if segment.slot_buckets else ""
    return (
        f"[{segment.start:.3g}, {segment.end:.3g})",
        f"{heads / units[0]:.0%}",
        f"{groups / units[1]:.0%}",
        str(segment.gate_size),
        ", ".join(paths),
        capacity + slots,
    )


def megabytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e6:.1f} MB"
