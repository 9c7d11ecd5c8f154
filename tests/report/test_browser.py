"""The page in a browser: no errors, every section, and no sideways scrolling on a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.report.conftest import Page, text_of
from tests.report.test_report import SECTIONS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--dump-dom",
)
PHONE = 390  # pixels
BROKEN = "<script>console.error('planted')</script><main><div style='width: 900px'>wide</div></main>"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed; run: apt-get install chromium")


class Opened(NamedTuple):
    dom: str
    console: list[str]


def opened(page: Path, profile: Path) -> Opened:
    """Open a file in a headless browser: its document after loading, and the lines of its console."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={profile}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return Opened(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line])


def framed(*pages: str) -> str:
    """Return a page that shows others in frames as wide as a phone, and writes how wide their contents are."""
    frames = "".join(
        f'<iframe width="{PHONE}" height="800" srcdoc="{html.escape(page, quote=True)}"></iframe>' for page in pages
    )
    script = """
    onload = () => {
        const widths = [...document.querySelectorAll("iframe")].map((frame) => {
            const root = frame.contentDocument;
            const charts = [...root.querySelectorAll("svg.chart")].map((chart) => chart.getBoundingClientRect().width);
            return {inner: root.documentElement.clientWidth, body: root.body.scrollWidth,
                    content: root.documentElement.scrollWidth, charts};
        });
        document.body.innerHTML = "<pre></pre>";
        document.querySelector("pre").textContent = JSON.stringify(widths);
    };
    """
    return f"<!DOCTYPE html><body>{frames}<script>{script}</script></body>"


def widths_of(dom: str) -> list[dict[str, Any]]:
    found = re.search(r"<pre>(.*?)</pre>", dom)
    assert found is not None, dom
    widths: list[dict[str, Any]] = json.loads(html.unescape(found[1]))
    return widths


def test_the_browser_finds_every_section_and_nothing_wrong(page: Page, tmp_path: Path) -> None:
    dom, console = opened(page.path, tmp_path / "profile")
    assert console == []
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", dom) == list(SECTIONS)
    assert text_of(dom) == page.text


def test_a_phone_scrolls_in_one_direction_only(page: Page, tmp_path: Path) -> None:
    """The second frame is a page with both faults that this module looks for."""
    (tmp_path / "frames.html").write_text(framed(page.html, BROKEN), encoding="utf-8")
    dom, console = opened(tmp_path / "frames.html", tmp_path / "profile")
    good, broken = widths_of(dom)
    assert max(good["body"], good["content"]) <= good["inner"] <= PHONE
    assert good["charts"]
    assert all(200 < width <= PHONE for width in good["charts"])
    assert broken["content"] > PHONE
    assert len(console) == 1
    assert "planted" in console[0]
