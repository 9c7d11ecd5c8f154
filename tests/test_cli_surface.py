"""The command line as it is promised: commands, options, types, choices and defaults, in ``cli_surface.txt``.

After a change on purpose: ``python -m tests.test_cli_surface`` writes the file again.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import typer

from dyexport.cli import COMMANDS, app, load_command
from dyexport.commands.options import SchedulerChoice, TokenPathChoice, model_names, target_names
from dyexport.noise_schedule import DDPM_SCHEDULERS, FLOW_SCHEDULERS

SURFACE = Path(__file__).with_name("cli_surface.txt")
OF_TYPER = ("install_completion", "show_completion")


def leaves() -> Iterator[tuple[str, Any]]:
    """Yield every command that runs something, by its name."""
    for name in COMMANDS:
        command = load_command(name)
        inner = getattr(command, "commands", None)
        yield from ((f"{name} {sub}", leaf) for sub, leaf in inner.items()) if inner else [(name, command)]


LEAVES = dict(leaves())


def type_name(hint: Any) -> str:
    """``int``, ``fp32|fp16``, ``str...`` for what may be repeated."""
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) is list:
        return f"{type_name(get_args(hint)[0])}..."
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    return type_name(kinds[0]) if kinds else hint.__name__


def describe(name: str, command: Any) -> str:
    """Return a command and its parameters, one per line."""
    hints = get_type_hints(command.callback.__wrapped__)
    rows = []
    for parameter in command.params:
        if parameter.name in OF_TYPER:
            continue
        option = parameter.param_type_name == "option"
        written = ", ".join((*parameter.opts, *parameter.secondary_opts)) if option else parameter.name.upper()
        default = "required" if parameter.required else f"default {parameter.default!s}"
        panel = getattr(parameter, "rich_help_panel", None)
        rows.append((written, type_name(hints[parameter.name]), default, f"[{panel}]" if panel else ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join((f"dyexport {name}".rstrip(), *(f"    {line}" for line in lines)))


def surface() -> str:
    root = ("", typer.main.get_command(app))
    return "\n\n".join(describe(name, command) for name, command in (root, *LEAVES.items())) + "\n"


def test_the_surface_is_as_committed() -> None:
    committed, present = SURFACE.read_text(encoding="utf-8").splitlines(), surface().splitlines()
    changes = "\n".join(difflib.unified_diff(committed, present, "tests/cli_surface.txt", "the code", lineterm=""))
    assert not changes, f"{changes}\n\nIf that is on purpose, run: python -m tests.test_cli_surface"


@pytest.mark.parametrize("command", LEAVES)
def test_help_has_three_examples_that_parse(command: str) -> None:
    module = import_module(f"dyexport.commands.{command.split()[0]}")
    examples = list(module.EXAMPLES)
    assert len(examples) == 3
    for example in examples:
        assert example in LEAVES[command].epilog.replace("\\[", "[")
        line = example.partition("|")[0].removeprefix("accelerate launch -m ")
        assert line.startswith(f"dyexport {command}")
        words = shlex.split(line)[1 + len(command.split()) :]
        LEAVES[command].make_context(command, words).close()


def test_choices_are_those_of_the_library() -> None:
    from dyexport.bundle.plan import TokenPath

    assert set(get_args(SchedulerChoice)) == {*DDPM_SCHEDULERS, *FLOW_SCHEDULERS}
    assert set(get_args(TokenPathChoice)) == {"auto", *get_args(TokenPath)} - {"all"}


def test_build_shows_fifteen_options_next_to_the_expert_ones() -> None:
    panels = [parameter.rich_help_panel for parameter in LEAVES["build"].params]
    shown = [panel for panel in panels if panel in ("Model", "Budget", "Training", "Engines", "Output")]
    assert len(shown) == 15
    assert {panel for panel in panels if panel and panel not in shown} == {"TensorRT", "Advanced"}


@pytest.mark.parametrize(
    ("words", "incomplete", "offered"),
    [
        ("dyexport ", "bu", ["build"]),
        ("dyexport build --model ", "sit-digits-", [name for name in model_names() if name.startswith("sit-digits-")]),
        ("dyexport build --target ", "", target_names()),
        ("dyexport build --precision ", "f", ["fp32", "fp16"]),
    ],
)
def test_completion_offers(
    words: str, incomplete: str, offered: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = words + incomplete
    monkeypatch.setenv("_DYEXPORT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
    with pytest.raises(SystemExit):
        app(prog_name="dyexport")
    assert capsys.readouterr().out.split() == offered


if __name__ == "__main__":
    SURFACE.write_text(surface(), encoding="utf-8")
