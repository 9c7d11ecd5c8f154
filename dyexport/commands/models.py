"""``dyexport models``: the models known by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from dyexport.console import DebugOption, JsonOption, emit, name_column
from dyexport.progress import count

ROOM_FOR_HUB = 76  # columns of a terminal

EXAMPLES = (
    "dyexport models",
    "dyexport models --json",
    "dyexport models --json | jq '.models[].name'",
)


def models(json: JsonOption = False, debug: DebugOption = False) -> None:
    """List the models known by name."""
    from dyexport.flops import FlopsModel
    from dyexport.presets import PRESETS

    rows = [
        {
            "name": preset.name,
            "parameters": preset.parameters,
            "gflops": FlopsModel.of_preset(preset).dense / 1e9,
            "tokens": preset.tokens,
            "objective": preset.objective,
            "weights": preset.hub_id,
            "about": preset.about,
        }
        for preset in PRESETS.values()
    ]
    emit({"models": rows}, as_json=json, human=lambda console: console.print(_model_table(rows, console.width)))


def _model_table(rows: Sequence[Mapping[str, Any]], width: int) -> Table:
    """Return a table that fits ``width`` columns; a narrow one leaves out where the weights are."""
    table = Table(name_column("model", [row["name"] for row in rows]))
    for header in ("parameters", "GFLOPs", "tokens"):
        table.add_column(header, justify="right", no_wrap=True)
    if width >= ROOM_FOR_HUB:
        table.add_column("weights on the hub", overflow="fold")
    for row in rows:
        size = count(row["parameters"])
        cells = (row["name"], size, f"{row['gflops']:.2f}", str(row["tokens"]), row["weights"] or "-")
        table.add_row(*cells[: len(table.columns)])
    return table
