"""``dyexport plan``: the cost of several numbers of engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from dyexport.commands.options import BuildOptions, takes_build_options
from dyexport.commands.results import plan_costs
from dyexport.commands.stages import OF_PLANS, building, checked_settings
from dyexport.console import DebugOption, JsonOption, emit, format_bytes

if TYPE_CHECKING:
    from dyexport.exporters.plan_cost import PlanCost

PLANNED_ENGINES = (1, 2, 4, 8, 16)


@takes_build_options
def plan(
    options: BuildOptions,
    context: typer.Context,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what K = 1, 2, 4, 8, 16 engines would cost. Calibrates if that is not done, but never trains."""
    settings = checked_settings(options, context, *OF_PLANS, last="prices of several K")
    with building(settings, without=settings.slow_stages) as pipeline:
        plans = [pipeline.priced(engines) for engines in PLANNED_ENGINES]
        rows = [{**plan_costs(found), "tensorrt": _predictions(pipeline.predicted(found))} for found in plans]
    formats = {"precision": settings.stored_precision, "quantization": settings.quantize}
    payload = {"model": options.model, **formats, "plans": rows}
    emit(payload, as_json=json, human=lambda console: console.print(_plan_table(rows)))


def _predictions(found: Mapping[str, PlanCost]) -> dict[str, dict[str, Any]]:
    return {target: asdict(cost) for target, cost in found.items()}


def _plan_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("engines", "lambda", "network FLOPs", "executed FLOPs", "disk", "resident", "resident, shared")
    targets = list(rows[0]["tensorrt"])
    for target in targets:
        table.add_column(f"{target} plans")
    for row in rows:
        ratios = (f"{row[name]:.3f}" for name in ("flops_ratio", "network_flops_ratio", "executed_flops_ratio"))
        sizes = (format_bytes(row[name]) for name in ("disk_bytes", "resident_bytes", "disk_bytes"))
        plans = (_plan_cost(row["tensorrt"][target]) for target in targets)
        table.add_row(str(row["engines"]), *ratios, *sizes, *plans)
    return table


def _plan_cost(cost: Mapping[str, Any]) -> str:
    """Of weights alone, and seconds only where plans of this work directory tell."""
    time = f"{cost['seconds']:.0f} s" if cost["seconds"] is not None else "time unknown, none was built here"
    return f"{format_bytes(cost['bytes'])} of weights, {time}"
