"""The ``dyexport`` command. Imports no torch; each command's module is imported when that command is named."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from threading import Event
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dyexport import __version__
from dyexport.commands.parsing import StrictCommand, epilog
from dyexport.console import Interrupted, Session, escape_what_streams_cannot_hold, stderr
from dyexport.errors import DyexportError, DyexportWarning, missing_extras

COMMANDS = (
    "build",
    "finetune",
    "calibrate",
    "export",
    "plan",
    "encode",
    "compile",
    "verify",
    "sample",
    "bench",
    "eval",
    "inspect",
    "report",
    "deploy",
    "models",
    "targets",
    "doctor",
    "demo",
)
"""Each is a module of ``dyexport.commands`` with a function or a typer app of its name."""

LONGEST_WORD = 200  # characters of a word in a message: a value may be as long as a command line


class CommandGroup(TyperGroup):
    """A group that imports the module of a command when the command is looked up."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.commands: dict[str, Any] = {**dict.fromkeys(COMMANDS), **self.commands}

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in COMMANDS and self.commands[cmd_name] is None:
            self.commands[cmd_name] = load_command(cmd_name)
        return self.commands.get(cmd_name)


def load_command(name: str) -> Any:
    """Import one of ``COMMANDS`` and return what parses and runs it."""
    module = import_module(f"dyexport.commands.{name}")
    described = getattr(module, name)
    if not isinstance(described, typer.Typer):
        function, described = described, typer.Typer(add_completion=False)
        described.command(name, cls=StrictCommand, epilog=epilog(module.EXAMPLES))(function)
    command = typer.main.get_command(described)
    command.name = name
    return command


app = typer.Typer(
    name="dyexport",
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"dyexport {__version__}")
        raise typer.Exit


@app.callback(epilog="`dyexport COMMAND --help` shows a command's options, and examples.")
def dyexport(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.", metavar=""),
    ] = False,
) -> None:
    """Turn diffusion transformers into slim engines that switch over the sampling steps."""


def main() -> None:
    """Run the command line. Errors are one sentence on stderr.

    Exit codes: 0, 1 (failed), 2 (bad usage), 130 (Ctrl-C).
    """
    escape_what_streams_cannot_hold()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # diffusers imports it, and it warns of absent kernels
    session, interrupted = Session(), Event()
    try:
        with recording_interrupts(interrupted), warnings_as_lines(), missing_extras():
            code = app(standalone_mode=False, obj=session)
            sys.stdout.flush()
            if code == Interrupted.exit_code:  # the parser turns Ctrl-C into a result
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        code = _report(Interrupted("interrupted; repeat the command to start again"))
    except BrokenPipeError:  # the reader of stdout is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        if session.debug and not hasattr(error, "format_message"):
            traceback.print_exc()
        if interrupted.is_set() and not isinstance(error, Interrupted):  # which a library turned into this
            error = Interrupted("interrupted; repeat the command to go on")
        code = _report(error)
    sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def recording_interrupts(interrupted: Event) -> Iterator[None]:
    """Set ``interrupted`` on Ctrl-C too, since libraries turn ``KeyboardInterrupt`` into other errors."""

    def record(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        signal.default_int_handler(number, frame)

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # a background job ignores it
        yield
        return
    signal.signal(signal.SIGINT, record)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Print dyexport's own warnings as one line each, without the place in the source code."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def line(message: Warning | str, category: type[Warning], *place: Any, **rest: Any) -> None:
            if issubclass(category, DyexportWarning):
                stderr().print(f"warning: {one_line(str(message))}", markup=False, soft_wrap=True)
            else:
                show(message, category, *place, **rest)

        warnings.showwarning = line
        yield


def one_line(message: str) -> str:
    """Return a message on one line, its longest words cut."""
    words = (word if len(word) <= LONGEST_WORD else f"{word[:LONGEST_WORD]}..." for word in message.split())
    return " ".join(words)


def _report(error: Exception) -> int:
    """Print one sentence about the error and return its exit code."""
    if isinstance(error, DyexportError):
        message, code = str(error), error.exit_code
    elif hasattr(error, "format_message"):  # the argument parser's own errors
        message, code = error.format_message() or "no command given; see dyexport --help", 2
    elif isinstance(error, OSError):
        message, code = f"{error.filename or 'input/output'}: {error.strerror or error}", 1
    else:
        message, code = f"{type(error).__name__}: {error} (this is a bug; --debug shows where)", 1
    stderr().print(f"dyexport: {one_line(message)}", markup=False, soft_wrap=True)
    return code
