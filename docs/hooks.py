"""Hooks of mkdocs: files of the repository become pages, commands are listed, and links are those of the site.

Pages are written so that they also read well in the repository: a link goes to where the file stands there. A link to a
file that is not part of the site becomes plain text on the site.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
COMMANDS = "reference/commands.md"
ADDED = {"ARCHITECTURE.md": "architecture.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Files of the repository that become pages, by their place on the site."""
RESULTS = "benchmarks/results"
INCLUDE = re.compile(r"^<!-- include (\S+) (\S+) -->$", re.MULTILINE)
CODE_OR_LINK = re.compile(
    r"(?P<code>^```.*?^```$|`[^`\n]+`)|(?P<bang>!?)\[(?P<text>(?:[^\[\]]|`[^`]*`)*)\]\((?P<target>[^)\s]+)\)",
    re.MULTILINE | re.DOTALL,
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that stand elsewhere in the repository, and the list of commands."""
    for source, place in ADDED.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    for result in sorted(path for path in (ROOT / RESULTS).rglob("*") if path.is_file()):
        level = InclusionLevel.NOT_IN_NAV
        place = f"results/{result.relative_to(ROOT / RESULTS).as_posix()}"
        files.append(File.generated(config, place, abs_src_path=str(result), inclusion=level))
    files.append(File.generated(config, COMMANDS, content=commands_page()))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Insert the included parts of other files, and turn links into links of the site."""
    source = page.file.abs_src_path
    origin = Path(source).relative_to(ROOT) if source else Path("docs", page.file.src_uri)
    markdown = INCLUDE.sub(lambda match: included(match[1], match[2], page.file.src_uri), markdown)
    return with_site_links(markdown, origin.parent.as_posix(), page.file.src_uri)


def included(name: str, part: str, page: str) -> str:
    """Return the text between ``<!-- part -->`` and ``<!-- /part -->`` of a file, with links for a page of the site."""
    text = (ROOT / name).read_text(encoding="utf-8")
    _, begin, rest = text.partition(f"<!-- {part} -->\n")
    inner, end, _ = rest.partition(f"<!-- /{part} -->")
    if not (begin and end):
        raise ValueError(f"{name} has no part {part!r}; mark it with <!-- {part} --> and <!-- /{part} -->")
    return with_site_links(inner, posixpath.dirname(name), page)


def with_site_links(markdown: str, folder: str, page: str) -> str:
    """Rewrite links relative to a ``folder`` of the repository as links relative to a page of the site."""

    def link(match: re.Match[str]) -> str:
        target = match["target"]
        if match["code"] or "://" in target or target.startswith(("#", "mailto:")):
            return match[0]
        path, hash_sign, anchor = target.partition("#")
        place = site_place(posixpath.normpath(posixpath.join(folder, path)))
        text = with_site_links(match["text"], folder, page)
        if place is None:
            return text
        moved = posixpath.relpath(place, posixpath.dirname(page) or ".")
        return f"{match['bang']}[{text}]({moved}{hash_sign}{anchor})"

    return CODE_OR_LINK.sub(link, markdown)


def site_place(path: str) -> str | None:
    """Return where a file of the repository stands on the site; None if it is not part of it."""
    if path in ADDED:
        return ADDED[path]
    if path == "README.md":
        return "index.md"
    if path.startswith(f"{RESULTS}/"):
        return f"results/{path.removeprefix(f'{RESULTS}/')}"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return None if (ROOT / path).exists() else path  # mkdocs reports a link to nothing


def commands_page() -> str:
    """Return the reference of all commands, from what their ``--help`` is made of."""
    parts = [
        "# Commands",
        "This page is generated from the help texts of the commands. `dyexport COMMAND --help` shows the same. Options "
        "that every command has: `--json` prints one JSON object on stdout ([JSON outputs](json.md)), `--debug` shows "
        "the traceback of an error. Exit codes: 0, 1 (failed), 2 (wrong usage), 130 (Ctrl-C).",
    ]
    for name, command in leaves():
        parts += [f"## dyexport {name}", *described(name, command)]
    return "\n\n".join(parts) + "\n"


def leaves() -> Iterator[tuple[str, Any]]:
    """Yield every command that runs something, by its name."""
    from dyexport.cli import COMMANDS, load_command

    for name in COMMANDS:
        command = load_command(name)
        inner = getattr(command, "commands", None)
        yield from ((f"{name} {sub}", leaf) for sub, leaf in inner.items()) if inner else [(name, command)]


def described(name: str, command: Any) -> Iterator[str]:
    """Yield the Markdown of a command: help, usage, options by panel, examples."""
    context = command.context_class(command, info_name=f"dyexport {name}")
    yield escape(command.help, quote=False)
    yield f"```sh\ndyexport {name} {' '.join(command.collect_usage_pieces(context))}\n```"
    panels: dict[str, list[str]] = {}
    for parameter in command.params:
        if parameter.name in ("json", "debug"):
            continue
        written, text = parameter.get_help_record(context) or (parameter.metavar, parameter.help)
        panel = getattr(parameter, "rich_help_panel", None) or ""
        panels.setdefault(panel, []).append(f"`{written}`\n:   {escape(text, quote=False)}")
    for panel, records in panels.items():
        yield "\n\n".join((f"**{panel}**", *records) if panel else records)
    examples = command.epilog.replace("\\[", "[").partition("Examples:")[2]
    lines = [line.strip() for line in examples.splitlines() if line.strip()]
    yield "```sh\n" + "\n".join(lines) + "\n```"
