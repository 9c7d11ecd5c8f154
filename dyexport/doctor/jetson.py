"""NVIDIA Jetson boards: the release of Jetson Linux (L4T), and the JetPack that it belongs to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

RELEASE_FILE = Path("etc/nv_tegra_release")
MODEL_FILE = Path("proc/device-tree/model")
FIRST_LINE = re.compile(r"#\s*R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)")

JETPACKS = {
    "36.3": "6.0",
    "36.4": "6.1 to 6.2.1",  # 36.4.0 is 6.1, 36.4.3 is 6.2, 36.4.4 is 6.2.1
    "38.2": "7.0",
    "38.4": "7.1",
    "39.2": "7.2",
}
"""JetPack by release of Jetson Linux; https://developer.nvidia.com/embedded/jetpack-archive."""


@dataclass(frozen=True, kw_only=True)
class Jetson:
    """A board. ``l4t`` is the release of Jetson Linux, such as ``36.4.7``; ``jetpack`` is None for an unknown one."""

    board: str | None
    l4t: str
    jetpack: str | None

    @property
    def major(self) -> int:
        """First number of the release: 36 for JetPack 6, 38 and 39 for JetPack 7."""
        return int(self.l4t.partition(".")[0])


def find_jetson(root: Path = Path("/")) -> Jetson | None:
    """Read the board's files below ``root``; None on other machines. Raises ``ValueError`` for an unknown format."""
    release = root / RELEASE_FILE
    if not release.is_file():
        return None
    l4t = parse_release(release.read_text(encoding="utf-8", errors="replace"))
    model = root / MODEL_FILE
    board = model.read_text(encoding="utf-8", errors="replace").strip("\0 \n") if model.is_file() else None
    return Jetson(board=board, l4t=l4t, jetpack=JETPACKS.get(".".join(l4t.split(".")[:2])))


def parse_release(text: str) -> str:
    """Return ``36.4.7`` for ``# R36 (release), REVISION: 4.7, GCID: ...``. Raises ``ValueError``."""
    if (found := FIRST_LINE.search(text)) is None:
        raise ValueError(f"/{RELEASE_FILE} starts with {text[:60]!r}, which names no release")
    return f"{found[1]}.{found[2]}"
