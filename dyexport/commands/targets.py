"""``dyexport targets``: the engine formats that a bundle can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from dyexport.console import DebugOption, JsonOption, emit, name_column

EXAMPLES = (
    "dyexport targets",
    "dyexport targets --json",
    "dyexport targets --json | jq '.targets[].name'",
)


def targets(json: JsonOption = False, debug: DebugOption = False) -> None:
    """List the engine formats that --target of a build takes, and what each was tested on."""
    from dyexport.bundle.targets import TARGETS

    shown = ("about", "proof", "quantized")
    rows = [{"name": name, **{field: getattr(target, field) for field in shown}} for name, target in TARGETS.items()]
    emit({"targets": rows}, as_json=json, human=lambda console: console.print(_target_table(rows)))


def _target_table(rows: Sequence[Mapping[str, str]]) -> Table:
    table = Table(name_column("target", [row["name"] for row in rows]), "writes", "proof", "with --quantize")
    for row in rows:
        table.add_row(*row.values())
    return table
