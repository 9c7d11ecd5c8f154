"""Commands that run a bundle: sample, bench, eval, inspect, demo. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import typer

app = typer.Typer()
