"""The summary in README and docs, between two comments that mark its place."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dyexport.errors import UsageError
from dyexport.files import write_atomically

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", DOCS / "why-not.md")


@dataclass(frozen=True)
class Part:
    """Text and a figure, for the place of a page between ``<!-- name -->`` and ``<!-- /name -->``."""

    name: str
    text: str
    figure: Path
    alternative: str

    @property
    def comments(self) -> tuple[str, str]:
        return comments(self.name)

    def placed(self, page: str, folder: Path) -> str | None:
        """Return a page with this part in its place; None for a page without a place."""
        begin, end = self.comments
        place = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
        if (found := place.search(page)) is None:
            return None
        link = f"![{self.alternative}]({os.path.relpath(self.figure, folder)})"
        between = "\n".join([begin, self.text.rstrip(), "", link, end])
        return page[: found.start()] + between + page[found.end() :]


def comments(name: str) -> tuple[str, str]:
    """Return the comments before and after a place."""
    return f"<!-- {name} -->", f"<!-- /{name} -->"


def publish(parts: Sequence[Part], pages: Sequence[Path]) -> None:
    """Put each part into every page that has a place for it. Raises ``UsageError`` if none has one for the first."""
    contents = {}
    for page in pages:
        content = page.read_text(encoding="utf-8")
        for part in parts:
            if (placed := part.placed(content, page.parent)) is not None:
                contents[page] = content = placed
            elif part is parts[0]:
                break
    if not contents:
        (begin, end), names = parts[0].comments, " or ".join(map(str, pages))
        raise UsageError(f"no page has a place for {parts[0].name}; add the lines {begin} and {end} to {names}")
    for page, content in contents.items():
        write_atomically(page, content.encode())
