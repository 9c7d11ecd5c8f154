"""Rich output as plain text."""

from __future__ import annotations

from rich.console import Console, RenderableType


def rendered(*parts: RenderableType, width: int = 160) -> str:
    console = Console(width=width, record=True, quiet=False, file=None, color_system=None)
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    return capture.get()
