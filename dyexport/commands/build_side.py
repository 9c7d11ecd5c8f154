"""Commands that make a bundle: build, its stages one at a time, models, plan, verify."""

from __future__ import annotations

import typer

app = typer.Typer()
