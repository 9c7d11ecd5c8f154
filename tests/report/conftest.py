"""One report of a small bundle, which many tests look at."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dyexport.bundle.reader import Bundle
from dyexport.cli import main
from tests.report.measured import write_bench, write_eval

STEPS = 5


@dataclass(frozen=True, kw_only=True)
class Page:
    """A report: its file, its text, and what the command printed."""

    path: Path
    html: str
    printed: dict[str, Any]
    bundle: Bundle

    @property
    def text(self) -> str:
        """The text of the page, one space between words."""
        return text_of(self.html)


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self._silent = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._silent += tag in ("style", "script", "svg")
        self.ids += [value for name, value in attributes if name == "id" and value]
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href") and value]

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in ("style", "script", "svg")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.parts.append(data)


def parsed(html: str) -> _Text:
    parser = _Text()
    parser.feed(html)
    return parser


def text_of(html: str) -> str:
    return " ".join(" ".join(parsed(html).parts).split())


def command(*arguments: object) -> tuple[int, str, str]:
    """Run ``dyexport``: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["dyexport", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
    return int(exit_.value.code or 0), out.getvalue(), err.getvalue()


@pytest.fixture(scope="session")
def page(sit_tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """A report with everything in it: samples, measurements, verification."""
    folder = tmp_path_factory.mktemp("report")
    write_bench(sit_tiny, folder / "bench.json")
    write_eval(sit_tiny, folder / "eval.json")
    measured = ("--bench", folder / "bench.json", "--eval", folder / "eval.json")
    options = ("--samples", 3, "--steps", STEPS, "--seed", 4, *measured, "-o", folder / "page.html", "--json")
    code, out, err = command("report", sit_tiny.root, *options)
    assert code == 0, err
    path = folder / "page.html"
    return Page(path=path, html=path.read_text(encoding="utf-8"), printed=json.loads(out), bundle=sit_tiny)
