"""``dyexport models``: the models known by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from dyexport.console import DebugOption, JsonOption, emit


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
    emit({"models": rows}, as_json=json, human=lambda console: console.print(_model_table(rows)))


def _model_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("model", "parameters", "GFLOPs", "tokens", "objective", "weights on the hub")
    for row in rows:
        size, flops = f"{row['parameters'] / 1e6:.1f} M", f"{row['gflops']:.2f}"
        table.add_row(row["name"], size, flops, str(row["tokens"]), row["objective"], row["weights"] or "-")
    return table
