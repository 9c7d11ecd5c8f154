"""Output that all commands share: one JSON object or tables on stdout, progress on stderr."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from threading import Lock
from time import monotonic
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.table import Column, Table
from rich.text import Text

from dyexport.errors import DyexportError
from dyexport.progress import Pace

QUIET = 30.0  # seconds between two lines about one stage, where there is no terminal
ROOM_FOR_BARS = 100  # columns of a terminal; on fewer, numbers and descriptions need what there is

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.", metavar="")]


@dataclass
class Session:
    """State of one run of the command line; ``debug`` is set when the parser reads the option."""

    debug: bool = False


def _note_debug(context: typer.Context, debug: bool) -> bool:
    if isinstance(context.obj, Session):
        context.obj.debug = debug
    return debug


DebugOption = Annotated[
    bool,
    typer.Option("--debug", callback=_note_debug, is_eager=True, help="Show the traceback of an error.", metavar=""),
]


class Interrupted(DyexportError):
    """Interruption by Ctrl-C. The message says how to resume."""

    exit_code = 130


def stderr() -> Console:
    """Return a console on stderr. Not cached, since tests and ``redirect_stdout`` replace the stream."""
    return Console(stderr=True, highlight=False)


def escape_what_streams_cannot_hold() -> None:
    """Write characters that the terminal's encoding lacks as escapes, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def emit(payload: Mapping[str, Any], *, as_json: bool, human: Callable[[Console], None]) -> None:
    """Print a command's result on stdout: the payload with ``--json``, otherwise what ``human`` prints."""
    if as_json:
        typer.echo(json.dumps(payload, indent=2, allow_nan=False))
    else:
        human(Console(highlight=False))


def pairs(lines: Sequence[tuple[str, str]]) -> Table:
    """Return a table of names and values."""
    table = Table(name_column("", [name for name, _ in lines]), Column(overflow="fold"), show_header=False, box=None)
    for name, value in lines:
        table.add_row(name, value)
    return table


def name_column(header: str, names: Sequence[str]) -> Column:
    """Return a first column that a narrow terminal does not cut: names that end alike must stay distinct."""
    return Column(header, no_wrap=True, min_width=max(map(len, names), default=0))


@contextmanager
def chatter_on_stderr() -> Iterator[None]:
    """Redirect what libraries print to stderr; stdout is for the result."""
    with redirect_stdout(sys.stderr):
        yield


class StageLines:
    """Progress of the stages of a build on stderr: a line for each finished stage.

    For a running stage, a terminal shows a bar with the time left. Other streams get a line every ``QUIET`` seconds.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = monotonic) -> None:
        self._console = console or stderr()
        self._clock = clock
        self._progress = _bars(self._console, clock)
        self._tasks: dict[str, TaskID] = {}
        self._paces: dict[str, Pace] = {}
        self._printed: dict[str, float] = {}  # times of the last lines, by stage
        self._lock = Lock()  # stages may run side by side
        self.finished_stages = 0

    def __enter__(self) -> StageLines:
        self._progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._progress.stop()

    def started(self, stage: str, why: str) -> None:
        with self._lock:
            self._paces[stage], self._printed[stage] = Pace(self._clock), self._clock()
            description = f"{escape(stage)} [dim]({escape(why)})[/dim]" if why else escape(stage)
            self._tasks[stage] = self._progress.add_task(description, total=None, pace=self._paces[stage])

    def advanced(self, stage: str, done: int, total: int, detail: str = "") -> None:
        with self._lock:
            if stage not in self._tasks:
                return
            self._paces[stage].advance(done, total)
            text = f"{stage}  {detail}"
            self._progress.update(self._tasks[stage], description=escape(text), completed=done, total=total)
            if not self._console.is_terminal and self._clock() - self._printed[stage] >= QUIET:
                self._printed[stage] = self._clock()
                self._print(f"{stage}: {self._paces[stage]}{detail and f', {detail}'}")

    def finished(self, stage: str, seconds: float, *, reused: bool) -> None:
        with self._lock:
            self.finished_stages += 1
            if stage in self._tasks:
                self._progress.remove_task(self._tasks.pop(stage))
            self._print(f"{stage}: {'up to date' if reused else f'done in {seconds:.1f} s'}{self._remark()}")

    def _remark(self) -> str:
        """Return what is added to the line of a finished stage."""
        return ""

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False)


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Show the progress of a command on stderr, as ``StageLines`` does. Yields a function of done and total."""
    with StageLines() as lines:
        lines.started(description, "")
        yield partial(lines.advanced, description)


class _Description(TextColumn):
    """Description of a stage on one line, cut to the room that the numbers leave."""

    def __init__(self) -> None:
        super().__init__("{task.description}", table_column=Column())

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"  # set on the text: rich does not narrow a column with no_wrap
        return text


class _Numbers(ProgressColumn):
    """Percentage, count, time elapsed and time left."""

    max_refresh = 0.5

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=True, overflow="ellipsis"))

    def render(self, task: Task) -> Text:
        return Text(str(task.fields["pace"]))


def _bars(console: Console, clock: Callable[[], float]) -> Progress:
    bar = [BarColumn(bar_width=20)] if console.width >= ROOM_FOR_BARS else []
    columns = (SpinnerColumn(table_column=Column(no_wrap=True)), _Description(), *bar, _Numbers())
    return Progress(*columns, console=console, get_time=clock, transient=True, disable=not console.is_terminal)


def format_bytes(count: float) -> str:
    """Return a size in decimal units, such as 18.8 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
