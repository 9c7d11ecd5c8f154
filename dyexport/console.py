"""What every command shares: options, the one JSON object on stdout, errors as one sentence, progress on stderr."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dyexport.errors import DyexportError

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; all else goes to stderr.")]


@dataclass
class Session:
    """One run of the command line; ``debug`` once the option was read."""

    debug: bool = False


def _note_debug(context: typer.Context, debug: bool) -> bool:
    if isinstance(context.obj, Session):
        context.obj.debug = debug
    return debug


DebugOption = Annotated[
    bool, typer.Option("--debug", callback=_note_debug, is_eager=True, help="Show the traceback of an error.")
]


class Interrupted(DyexportError):
    """Ctrl-C, said in a sentence that tells how to go on."""

    exit_code = 130


def stderr() -> Console:
    """Made anew each time, since tests and ``redirect_stdout`` replace the stream."""
    return Console(stderr=True, highlight=False)


def escape_what_streams_cannot_hold() -> None:
    """A character that the terminal's encoding lacks is written as an escape, instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def emit(payload: Mapping[str, Any], *, as_json: bool, human: Callable[[Console], None]) -> None:
    """A command's result: the payload with ``--json``, else whatever ``human`` draws, on stdout."""
    if as_json:
        typer.echo(json.dumps(payload, indent=2, allow_nan=False))
    else:
        human(Console(highlight=False))


def pairs(lines: Sequence[tuple[str, str]]) -> Table:
    """Names, and what they stand for."""
    table = Table(show_header=False, box=None)
    for name, value in lines:
        table.add_row(name, value)
    return table


@contextmanager
def chatter_on_stderr() -> Iterator[None]:
    """What libraries print while a command works goes to stderr; stdout is for the result."""
    with redirect_stdout(sys.stderr):
        yield


class StageLines:
    """One line on stderr for each stage of a build; on a terminal also a bar with time left for each under way."""

    def __init__(self) -> None:
        self._console = stderr()
        self._progress = _bars(self._console)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> StageLines:
        self._progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._progress.stop()

    def started(self, stage: str, why: str) -> None:
        self._tasks[stage] = self._progress.add_task(f"{stage} [dim]({why})[/dim]", total=None)

    def advanced(self, stage: str, done: int, total: int, detail: str = "") -> None:
        if stage in self._tasks:
            self._progress.update(self._tasks[stage], description=f"{stage}  {detail}", completed=done, total=total)

    def finished(self, stage: str, seconds: float, *, reused: bool) -> None:
        if stage in self._tasks:
            self._progress.remove_task(self._tasks.pop(stage))
        self._console.print(f"{stage}: {'up to date' if reused else f'done in {seconds:.1f} s'}")


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with time left on stderr; nothing when stderr is not a terminal. Call it with done and total."""
    with _bars(stderr()) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _bars(console: Console) -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def format_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
