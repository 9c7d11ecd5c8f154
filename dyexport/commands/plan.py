"""``dyexport plan``: the cost of several numbers of engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dyexport.commands import options
from dyexport.commands.results import plan_costs, unbudgeted_line
from dyexport.commands.stages import building, settings_of
from dyexport.console import DebugOption, JsonOption, emit, format_bytes, pairs

if TYPE_CHECKING:
    from dyexport.exporters.plan_cost import PlanCost

PLANNED_ENGINES = (1, 2, 4, 8, 16)
EXAMPLES = (
    "dyexport plan --work work/",
    "dyexport plan --work work/ --target tensorrt-rtx",
    "dyexport plan --model dit-xl-2 --budget 0.5 --random-weights",
)


def plan(
    context: typer.Context,
    work: options.WorkOption = None,
    model: options.ModelOption = None,
    checkpoint: options.CheckpointOption = None,
    lora: options.LoraOption = None,
    random_weights: options.RandomWeightsOption = False,
    budget: options.BudgetOption = None,
    widths: options.WidthsOption = None,
    data: options.DataOption = None,
    finetune_steps: options.FinetuneStepsOption = None,
    td_lora: options.TdLoraOption = None,
    target: options.BuildTargetOption = None,
    precision: options.PrecisionOption = None,
    quantize: options.QuantizeOption = None,
    router: options.RouterOption = None,
    token_router: options.TokenRouterOption = None,
    synthetic: options.SyntheticOption = None,
    token_path: options.TokenPathOption = None,
    baseline: options.BaselineOption = None,
    memory: options.BuildMemoryOption = None,
    seed: options.SeedOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Print what 1, 2, 4, 8 and 16 engines would cost in FLOPs and memory, or the one of static widths.

    Calibrates a model that is not calibrated yet; never trains.
    """
    settings = settings_of(context)
    with building(settings, without=settings.slow_stages) as run:
        from dyexport.pipeline.build import price_plans

        static = settings.planned_widths == "static"
        plans = price_plans(run, (settings.engines,) if static else PLANNED_ENGINES)
    rows = [
        {"budget": priced.budget, **plan_costs(priced.plan), "tensorrt": _predictions(priced.tensorrt)}
        for priced in plans
    ]
    formats = {"precision": settings.stored_precision, "quantization": settings.quantize}
    payload = {"model": settings.preset.name, **formats, "plans": rows}

    def show(console: Console) -> None:
        for budget in dict.fromkeys(row["budget"] for row in rows):
            same = [row for row in rows if row["budget"] == budget]
            console.print(_plan_table(same, f"budget {budget:g}, " if settings.budgets else ""))
            console.print(*_tensorrt_lines(same))
        if settings.budget is None:
            console.print(unbudgeted_line(settings.routers, rows[0]["flops_ratio"]), soft_wrap=True)

    emit(payload, as_json=json, human=show)


def _predictions(costs: Mapping[str, PlanCost]) -> dict[str, dict[str, Any]]:
    return {target: asdict(cost) for target, cost in costs.items()}


def _plan_table(rows: Sequence[Mapping[str, Any]], budget: str) -> Table:
    """Return FLOPs as shares of the dense model's, and sizes of weights."""
    table = Table(
        title=f"{budget}FLOPs relative to dense, and size of weights",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )
    for header in ("engines", "lambda", "network", "executed", "disk", "resident"):
        table.add_column(header, justify="right", no_wrap=True)
    table.caption, table.caption_justify = "Engines that share weights are resident with the size on disk.", "left"
    for row in rows:
        ratios = (f"{row[name]:.3f}" for name in ("flops_ratio", "network_flops_ratio", "executed_flops_ratio"))
        sizes = (format_bytes(row[name]) for name in ("disk_bytes", "resident_bytes"))
        table.add_row(str(row["engines"]), *ratios, *sizes)
    return table


def _tensorrt_lines(rows: Sequence[Mapping[str, Any]]) -> Sequence[Table]:
    """Return a table for each TensorRT target; seconds are known only if this work directory has built plans."""
    tables = []
    for target in rows[0]["tensorrt"]:
        lines = []
        for row in rows:
            cost = row["tensorrt"][target]
            time = "unknown time" if cost["seconds"] is None else f"{cost['seconds']:.0f} s"
            engines = "1 engine" if row["engines"] == 1 else f"{row['engines']} engines"
            lines.append((engines, f"{format_bytes(cost['bytes'])} of weights, {time}"))
        table = pairs(lines)
        table.title, table.title_justify = f"{target} plans", "left"
        tables.append(table)
    return tables
