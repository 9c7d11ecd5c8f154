"""The summary in README and docs, between two comments that mark its place."""

from __future__ import annotations

import re
from pathlib import Path

from dyexport.errors import UsageError
from dyexport.files import write_atomically

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "docs" / "why-not.md")


def marker(model: str) -> tuple[str, str]:
    """Return the comments before and after the summary of a model."""
    return f"<!-- rivals {model} -->", f"<!-- /rivals {model} -->"


def publish(model: str, text: str, pages: tuple[Path, ...] = PAGES) -> None:
    """Replace what is between the comments on every page. Raises ``UsageError`` for a page without them."""
    begin, end = marker(model)
    contents = {}
    for page in pages:
        place = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
        content = page.read_text(encoding="utf-8")
        if not place.search(content):
            raise UsageError(f"{page} has no place for the summary of {model}; add the lines {begin} and {end}")
        contents[page] = place.sub(lambda _: f"{begin}\n{text.rstrip()}\n{end}", content)
    for page, content in contents.items():
        write_atomically(page, content.encode())
