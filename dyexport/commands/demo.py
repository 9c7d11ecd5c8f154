"""``dyexport demo``: the main job from nothing, on digits."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dyexport.console import DebugOption, JsonOption, emit

EXAMPLES = (
    "dyexport demo",
    "dyexport demo -o /tmp/demo",
    "dyexport demo --json",
)


def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Directory of everything that is written.", metavar="DIR")
    ] = Path("out/demo"),
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a small model of digits, make it dynamic, build, verify, time, score and sample: minutes on a CPU."""
    from dyexport.commands.stages import stage_lines

    with stage_lines() as lines:
        from dyexport.bench.report import as_table
        from dyexport.demo import demo_rows, demo_settings, run_demo

        report = run_demo(demo_settings(out), lines)
    table = as_table(f"bundle: {report.bundle}   pictures: {report.pictures}", ("measured", "value"), demo_rows(report))
    emit(asdict(report), as_json=json, human=lambda console: console.print(table))
