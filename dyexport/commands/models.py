"""``dyexport models``: the models known by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dyexport.commands.options import model_names
from dyexport.console import DebugOption, JsonOption, emit, name_column
from dyexport.progress import count

ROOM_FOR_HUB = 76  # columns of a terminal

EXAMPLES = (
    "dyexport models",
    "dyexport models --json | jq '.models[].name'",
    "dyexport models --memory flux",
)


def models(
    memory: Annotated[
        str | None,
        typer.Option(
            help="Instead show what fine-tuning this model takes, by the options that save memory, and on which GPUs.",
            metavar="NAME",
            autocompletion=model_names,
        ),
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List the models known by name."""
    if memory is not None:
        _show_memory(memory, json)
        return
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


def _show_memory(name: str, json: bool) -> None:
    """Print estimates of the memory of fine-tuning a model by its recipe."""
    from dyexport.presets import get_preset
    from dyexport.training.memory import CARDS, memory_table, run_of_recipe

    run = run_of_recipe(get_preset(name))
    rows = memory_table(run)
    payload = {"model": name, "batch": run.schedule.batch_size, "cards_gb": list(CARDS), "settings": rows}

    def show(console: Console) -> None:
        table = Table(
            title=f"Fine-tuning {name}: estimated GB of one GPU, and samples at a time that fit",
            title_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        table.add_column("base")
        table.add_column("optimizer", no_wrap=True)
        for header in ("weights", "training", "a sample", *(f"{card} GB" for card in CARDS)):
            table.add_column(header, justify="right")
        for row in rows:
            fixed = row["gradients_bytes"] + row["optimizer_bytes"]
            sizes = (row["weights_bytes"], fixed, row["activations_bytes"])
            cells = (_samples(row["cards"][str(card)]) for card in CARDS)
            table.add_row(row["base_precision"], row["optimizer"], *(f"{size / 1e9:.1f}" for size in sizes), *cells)
        console.print(table)
        console.print(
            f"A batch has {run.schedule.batch_size} samples. With * blocks are recomputed, as for column `a sample`."
            " A build chooses both.",
            soft_wrap=True,
            markup=False,
        )

    emit(payload, as_json=json, human=show)


def _samples(division: Mapping[str, Any] | None) -> str:
    if division is None:
        return "-"
    return f"{division['micro_batch']}{'*' if division['checkpointing'] else ''}"


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
