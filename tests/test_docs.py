"""The documentation: commands parse, links lead somewhere, messages and JSON keys are those of the code."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from docs.docstrings import markdown
from docs.hooks import COMMANDS, ROOT, commands_page, leaves, with_site_links
from dyexport.cli import app

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = ROOT / "docs" / COMMANDS
SOURCES = ("dyexport", "calibration", "engines", "exporters")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
TERM = re.compile(r"^`(.*)`\n:   ", re.MULTILINE)
SECTION = re.compile(r"^## (.*)\n((?:(?!## ).*\n)*)", re.MULTILINE)
KEYS = re.compile(r"^\| (`[^|]*`) \|", re.MULTILINE)

page_name = {page: page.relative_to(ROOT).as_posix() for page in PAGES}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def fenced(text: str, *languages: str) -> list[str]:
    """Return the code blocks in one of these languages."""
    return [block for language, block in FENCE.findall(text) if language in languages]


def shell_lines(text: str) -> Iterator[str]:
    """Yield lines of a shell: in fenced blocks, in indented ones and between backticks."""
    prose = FENCE.sub("", text)
    blocks = [*fenced(text, "", "sh", "bash"), *re.findall(r"^ {4,}\S.*$", prose, re.MULTILINE)]
    yield from "\n".join(blocks).replace("\\\n", " ").splitlines()
    yield from INLINE.findall(prose.replace("\n", " "))


def command_lines(text: str) -> Iterator[str]:
    """Yield the calls of ``dyexport``."""
    for line in shell_lines(text):
        if found := re.match(r"\s*(?:accelerate launch .*?-m )?(dyexport [a-z].*)", line):
            yield found[1]


def check_command_line(line: str) -> None:
    """Raises for an unknown command, an unknown option and an argument too many. Values are not looked at."""
    words = [word for word in shlex.split(line.partition(" | ")[0], comments=True) if word != "..."][1:]
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and words:
        name, *words = words
        command = command.get_command(command.context_class(command), name)
        assert command is not None, f"No such command {name!r}"
    _, arguments, _ = command.make_parser(command.context_class(command)).parse_args(args=words)
    taken = sum(parameter.param_type_name == "argument" for parameter in command.params)
    assert len([word for word in arguments if word is not None]) <= taken, f"No such arguments: {arguments}"


LINES = sorted({(page_name[page], line) for page in PAGES for line in command_lines(text_of(page))})


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


def test_scripts_and_make_targets_exist() -> None:
    targets = set(re.findall(r"^(\w[\w-]*):", text_of(ROOT / "Makefile"), re.MULTILINE))
    named = set()
    for line in (line for page in PAGES for line in shell_lines(text_of(page))):
        if found := re.match(r"\s*python (?:-m ([\w.]+)|([\w/]+\.py))", line):
            place = ROOT / (found[2] or found[1].replace(".", "/"))
            scripts = (place, place.with_suffix(".py"), place / "__main__.py")
            assert found[1] in ("venv", "http.server") or any(script.is_file() for script in scripts), line
        if found := re.match(r"\s*make ([a-z][\w-]*)(?: |$)", line):
            assert found[1] in targets, line
            named.add(found[1])
    assert {"demo", "test", "docs"} <= named


@pytest.mark.parametrize("page", PAGES, ids=page_name.get)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(FENCE.sub("", text_of(page))):
        if "://" in target:
            continue
        linked = page.parent / target
        if linked.resolve() == GENERATED:  # exists on the site alone, whose build checks its anchors
            continue
        assert linked.exists(), f"{target} does not exist"
        if anchor:
            assert anchor[1:] in anchors(text_of(linked)), f"{target} has no {anchor}"


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(text)}


def test_links_become_those_of_the_site() -> None:
    text = (
        "[`flops.py`](../../dyexport/flops.py), [a](../../CHANGELOG.md#added), [b](budget.md), `[c](d)`, [e](../no.md)"
    )
    linked = "`flops.py`, [a](../changelog.md#added), [b](budget.md), `[c](d)`, [e](../no.md)"
    assert with_site_links(text, "docs/howto", "howto/lora.md") == linked
    assert with_site_links("![x](docs/figures/x.png)", "", "index.md") == "![x](figures/x.png)"


def test_the_start_page_has_every_page_of_the_menu() -> None:
    menu = re.findall(r"^ +- .*: (\S+\.md)$", text_of(ROOT / "mkdocs.yml"), re.MULTILINE)
    start = with_site_links(text_of(ROOT / "docs" / "index.md"), "docs", "index.md")
    assert len(menu) > 30
    assert [page for page in menu if page != "index.md" and f"]({page})" not in start] == []


def test_docstrings_become_markdown() -> None:
    text = "Summary.\n\nname    a text\n        that goes on\nx, y    two\n\n>>> load()\n1\n\nNo columns here."
    listed = "`name`\n:   a text that goes on\n\n`x`, `y`\n:   two\n"
    assert listed in markdown(text)
    assert "```python\n>>> load()\n1\n```" in markdown(text)
    assert markdown(text).endswith("No columns here.")


def test_the_reference_of_commands_is_complete() -> None:
    page = commands_page()
    for name, command in leaves():
        assert f"## dyexport {name}\n" in page
        for parameter in command.params:
            assert all(word in page for word in parameter.opts if word.startswith("-")), parameter.name


def test_the_reference_of_the_library_is_complete() -> None:
    import dyexport

    page = text_of(ROOT / "docs" / "reference" / "library.md")
    listed = re.findall(r"^::: dyexport\.(\w+)$", page, re.MULTILINE)
    assert sorted(listed) == sorted(name for name in dyexport.__all__ if name != "__version__")


@cache
def message_templates() -> str:
    """Return every text of the package, with ``...`` for what is formatted into it."""
    texts = set()
    for file in (file for folder in SOURCES for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(text_of(file))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
                texts.add("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(re.sub(r"\{[^}]*\}", "...", node.value))
    return "\n".join(texts)


MESSAGES = TERM.findall(text_of(ROOT / "docs" / "troubleshooting.md"))


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_of_the_page_on_troubleshooting_are_in_the_code(message: str) -> None:
    assert found_in_code(message)


def found_in_code(message: str) -> bool:
    """Return whether a text of the package has this message, ``...`` being anything."""
    return re.search(re.escape(message).replace(r"\.\.\.", ".*"), message_templates()) is not None


def test_messages_are_found() -> None:
    assert len(MESSAGES) > 20
    assert found_in_code("no published weights are known for ...; pass ...")
    assert not found_in_code("no published weights ... are known")


JSON_KEYS = {
    heading: {key for cell in KEYS.findall(section) for key in INLINE.findall(cell)}
    for heading, section in SECTION.findall(text_of(ROOT / "docs" / "reference" / "json.md"))
}


@pytest.mark.parametrize("command", ["models", "targets"])
def test_json_keys_of_lists_are_documented(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(printed(command, capsys)) == JSON_KEYS[command]


def printed(line: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Run a command with ``--json`` and return what it prints."""
    import json

    app([*shlex.split(line), "--json"], standalone_mode=False)
    return json.loads(capsys.readouterr().out)


def test_architecture_names_what_exists() -> None:
    named = re.findall(r"`([a-z_]+(?:/[a-z_]+)?\.py)` `(\w+)`", text_of(ROOT / "ARCHITECTURE.md"))
    assert len(named) > 15
    for module, name in named:
        text = text_of(ROOT / "dyexport" / module)
        assert re.search(rf"^(?:def|class) {name}\b", text, re.MULTILINE), f"{module} has no {name}"
