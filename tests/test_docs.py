"""The documentation: its command lines parse, its links lead somewhere, and its Python page runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

from docs.hooks import COMMANDS, ROOT, commands_page, leaves
from dyexport.cli import app

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = ROOT / "docs" / COMMANDS
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def fenced(text: str, *languages: str) -> list[str]:
    """Return the code blocks in one of these languages."""
    return [block for language, block in FENCE.findall(text) if language in languages]


def command_lines(text: str) -> Iterator[str]:
    """Yield the shell lines that call ``dyexport``: in fenced blocks, in indented ones and between backticks."""
    prose = FENCE.sub("", text)
    blocks = [*fenced(text, "", "sh", "bash"), *re.findall(r"^ {4,}\S.*$", prose, re.MULTILINE)]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    for line in [*lines, *INLINE.findall(prose.replace("\n", " "))]:
        if found := re.match(r"\s*(?:accelerate launch .*?-m )?(dyexport [a-z].*)", line):
            yield found[1]


def check_command_line(line: str) -> None:
    """Raises for an unknown command, an unknown option and an argument too many. Values are not looked at."""
    words = [word for word in shlex.split(line, comments=True) if word != "..."][1:]
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and words:
        name, *words = words
        command = command.get_command(command.context_class(command), name)
        assert command is not None, f"No such command {name!r}"
    _, arguments, _ = command.make_parser(command.context_class(command)).parse_args(args=words)
    taken = sum(parameter.param_type_name == "argument" for parameter in command.params)
    assert len([word for word in arguments if word is not None]) <= taken, f"No such arguments: {arguments}"


LINES = sorted(
    {
        (page.relative_to(ROOT).as_posix(), line)
        for page in PAGES
        for line in command_lines(page.read_text(encoding="utf-8"))
    }
)


@pytest.mark.parametrize(("page", "line"), LINES)
def test_command_lines_parse(page: str, line: str) -> None:
    check_command_line(line)


def test_command_lines_are_found() -> None:
    assert {"build", "verify", "bench", "deploy"} <= {line.split()[1] for _, line in LINES}


@pytest.mark.parametrize(
    "line", ["dyexport bild", "dyexport build --bugdet 0.5", "dyexport deploy tritn x y", "dyexport models all"]
)
def test_a_wrong_command_line_is_an_error(line: str) -> None:
    with pytest.raises(Exception, match="No such"):
        check_command_line(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, anchor in LINK.findall(text):
        if "://" in target:
            continue
        linked = page.parent / target
        if linked.resolve() == GENERATED:  # exists on the site alone, whose build checks its anchors
            continue
        assert linked.exists(), f"{target} does not exist"
        if anchor:
            assert anchor[1:] in anchors(linked.read_text(encoding="utf-8")), f"{target} has no {anchor}"


def test_the_reference_of_commands_is_complete() -> None:
    page = commands_page()
    for name, command in leaves():
        assert f"## dyexport {name}\n" in page
        for parameter in command.params:
            assert all(word in page for word in parameter.opts if word.startswith("-")), parameter.name


def test_architecture_names_what_exists() -> None:
    table = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = re.findall(r"`([a-z_]+(?:/[a-z_]+)?\.py)` `(\w+)`", table)
    assert len(named) > 15
    for module, name in named:
        text = (ROOT / "dyexport" / module).read_text(encoding="utf-8")
        assert re.search(rf"^(?:def|class) {name}\b", text, re.MULTILINE), f"{module} has no {name}"


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(text)}


@pytest.fixture
def small_dit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Make the bundle and the VAE of DiT-XL/2 that the Python page names, in small."""
    from diffusers import AutoencoderKL

    from dyexport.presets import PRESETS
    from tests.pipeline.tiny import build, tiny_settings

    monkeypatch.chdir(tmp_path)
    small = replace(PRESETS["dit-xl-2"], layers=2, hidden_size=48, heads=4, sample_size=8)
    monkeypatch.setitem(PRESETS, small.name, small)
    settings = tiny_settings(tmp_path / "work" / small.name, model=small.name, engines=2)
    build(replace(settings, out=tmp_path / f"{small.name}-0.5"))
    layers = {"block_out_channels": (4, 4, 4, 4), "norm_num_groups": 1, "layers_per_block": 1}
    types = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    AutoencoderKL(**layers, **types).save_pretrained("stabilityai/sd-vae-ft-ema")


@pytest.mark.build
@pytest.mark.usefixtures("small_dit")
def test_the_python_page_runs() -> None:
    page = ROOT / "docs" / "howto" / "python.md"
    names: dict[str, Any] = {}
    for block in fenced(page.read_text(encoding="utf-8"), "python"):
        exec(compile(block, page.name, "exec"), names)
    assert names["values"].shape == (2, 1, 8, 8)
    assert names["velocity"].shape == (2, 1, 8, 8)
    assert names["image"].size == (64, 64)
    assert set(names["paths"]) == {*(f"segment-{k:02d}" for k in range(4)), "conditioning", "dense"}
