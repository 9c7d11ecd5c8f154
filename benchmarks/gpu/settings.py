"""Settings that all sections of the GPU benchmark share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.timing import Timing
from dyexport.bundle.spec import Precision


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a run. ``steps`` are of a trajectory, which is conditioned once; ``work`` holds bundles.

    ``patience`` is the most seconds for one command.
    """

    device: str
    steps: int
    rounds: int
    repeats: int
    work: Path
    patience: float = 200.0

    def timing(self, *, compiled: bool = False) -> Timing:
        return Timing(device=self.device, rounds=self.rounds, repeats=self.repeats, compiled=compiled)

    def precision(self, on_gpu: Precision) -> Precision:
        """Return the precision of torch modules and graphs: fp32 on a CPU, which has few kernels for the others."""
        return "fp32" if self.device == "cpu" else on_gpu


@dataclass(frozen=True, kw_only=True)
class Section:
    """A kind of measurement, and its cases in the order of their worth.

    ``measure(case, settings)`` returns a record. ``rehearsal`` are small cases that run the same code on a CPU.
    ``kind`` selects the table that its records are shown in.
    """

    kind: str
    measure: Callable[[str, Settings], dict[str, Any]]
    cases: tuple[str, ...]
    rehearsal: tuple[str, ...]
