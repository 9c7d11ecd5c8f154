"""Isolated probes: one that fails is a finding, and the others go on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from dyexport.errors import DyexportError, reason

T = TypeVar("T")


@dataclass
class Findings:
    """Failures of probes by their names. A broken installation raises errors of any kind."""

    problems: dict[str, str] = field(default_factory=dict)

    def attempt(self, name: str, probe: Callable[[], T]) -> T | None:
        """Return what a probe finds, or None and record why it failed."""
        try:
            return probe()
        except Exception as error:  # whatever a half-installed library raises
            self.problems[name] = explain(error)
            return None


def explain(error: Exception) -> str:
    """Return one line about an error; the type names those that are not dyexport's own."""
    return reason(error) if isinstance(error, DyexportError) else f"{type(error).__name__}: {reason(error)}"
