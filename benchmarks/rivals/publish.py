"""The summary in README and docs, between two comments that mark its place."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from dyexport.errors import UsageError
from dyexport.files import write_atomically

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", DOCS / "why-not.md")
ALT = "Frechet distance of {model} and its rivals over the FLOPs of one picture"


def marker(model: str) -> tuple[str, str]:
    """Return the comments before and after the summary of a model."""
    return f"<!-- rivals {model} -->", f"<!-- /rivals {model} -->"


def publish(model: str, text: str, chart: Path, pages: Sequence[Path]) -> None:
    """Put text and a chart between the comments of every page that has them. Raises ``UsageError`` if none has."""
    begin, end = marker(model)
    place = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    contents = {}
    for page in pages:
        content = page.read_text(encoding="utf-8")
        if (found := place.search(content)) is None:
            continue
        link = f"![{ALT.format(model=model)}]({os.path.relpath(chart, page.parent)})"
        between = "\n".join([begin, text.rstrip(), "", link, end])
        contents[page] = content[: found.start()] + between + content[found.end() :]
    if not contents:
        names = " or ".join(map(str, pages))
        raise UsageError(f"no page has a place for the summary of {model}; add the lines {begin} and {end} to {names}")
    for page, content in contents.items():
        write_atomically(page, content.encode())
