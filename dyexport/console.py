"""What every command shares: options, the one JSON object on stdout, errors as one sentence, progress on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dyexport.errors import DyexportError

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; all else goes to stderr.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


class Interrupted(DyexportError):
    """Ctrl-C, said in a sentence that tells how to go on."""

    exit_code = 130


def stderr() -> Console:
    """Made anew each time, since tests and ``redirect_stdout`` replace the stream."""
    return Console(stderr=True, highlight=False)


def emit(payload: Mapping[str, Any], *, as_json: bool, human: Callable[[Console], None]) -> None:
    """A command's result: the payload with ``--json``, else whatever ``human`` draws, on stdout."""
    if as_json:
        typer.echo(json.dumps(payload, indent=2, allow_nan=False))
    else:
        human(Console(highlight=False))


@contextmanager
def chatter_on_stderr() -> Iterator[None]:
    """What libraries print while a command works goes to stderr; stdout is for the result."""
    with redirect_stdout(sys.stderr):
        yield


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with time left on stderr; nothing when stderr is not a terminal. Call it with done and total."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = stderr()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def format_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
