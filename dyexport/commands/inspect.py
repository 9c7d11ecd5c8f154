"""``dyexport inspect``: the segments of a bundle, its widths, and its TensorRT plans."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dyexport.commands import options
from dyexport.commands.bundles import at_budget
from dyexport.commands.parsing import ExplicitOptions
from dyexport.console import DebugOption, JsonOption, chatter_on_stderr, emit
from dyexport.errors import UsageError

CELLS = 64  # of the heat map, in columns of a terminal
LABELS = 8  # columns of the block numbers

EXAMPLES = (
    "dyexport inspect sit-digits-0.5",
    "dyexport inspect sit-digits-0.5 --png widths.png",
    "dyexport inspect dit-xl-2-0.5 --engine tensorrt-rtx/segment-00",
)


def inspect(
    context: typer.Context,
    bundle: options.BundleArgument,
    budget: options.BundleBudgetOption = None,
    png: Annotated[Path | None, typer.Option(help="Also write the heat map as a picture.", metavar="FILE")] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="Show one TensorRT plan instead, such as tensorrt-rtx/segment-00.", metavar="TARGET/NETWORK"),
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show the segments of a bundle and a heat map of its widths over t and depth."""
    ExplicitOptions(context).refuse(engine is not None, "--engine shows a plan, which has no heat map", "png")
    if png is not None and png.suffix.lower() not in ("", ".png"):
        raise UsageError(f"--png is {png}; a picture goes into .png")
    bundle = at_budget(bundle, budget)
    if engine is not None:
        _inspect_plan(bundle, engine, json)
        return
    with chatter_on_stderr():
        from dyexport.bench.pictures import save_png
        from dyexport.bench.report import inspect_payload, inspect_table
        from dyexport.bundle.reader import Bundle
        from dyexport.report.width_map import WidthMap
        from dyexport.report.width_map_image import POINTS, render_image
        from dyexport.report.width_map_text import render_text

        opened = Bundle.open(bundle)
        if png is not None:
            save_png(render_image(WidthMap.of(opened, POINTS)), png)

    def show(console: Console) -> None:
        cells = max(min(console.width - LABELS, CELLS), 1)
        heat_map = render_text(WidthMap.of(opened, cells), ascii_only=console.options.ascii_only)
        console.print(inspect_table(opened), "", heat_map, sep="\n")

    emit(inspect_payload(opened), as_json=json, human=show)


def _inspect_plan(bundle: Path, engine: str, as_json: bool) -> None:
    from dyexport.bench.tensorrt_plans import plan_lines, plan_of
    from dyexport.bundle.reader import Bundle

    target, slash, network = engine.partition("/")
    if not (target and slash and network):
        raise UsageError(f"--engine is {engine!r}; write TARGET/NETWORK, such as tensorrt-rtx/segment-00")
    info = plan_of(Bundle.open(bundle), target, network)
    emit(info.model_dump(mode="json"), as_json=as_json, human=lambda console: console.print(*plan_lines(info)))
