"""Whether the machine was ours while something was timed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from time import process_time

STAT = Path("/proc/stat")


@dataclass(frozen=True, kw_only=True)
class CpuTime:
    """Seconds since boot: of all processors together, of these the idle ones, and of this process."""

    total: float
    idle: float
    own: float


def cpu_time(stat: Path = STAT) -> CpuTime | None:
    """None where the system does not tell."""
    try:
        fields = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    ticks = os.sysconf("SC_CLK_TCK")
    return CpuTime(total=sum(fields) / ticks, idle=(fields[3] + fields[4]) / ticks, own=process_time())


def taken_by_others(before: CpuTime | None, after: CpuTime | None) -> float | None:
    """Share of the processors' time that went neither to this process nor to nobody, in [0, 1].

    Where it is not near zero, ratios between backends say little: threads that wait for each other at
    every operator, as torch's do, lose more to a neighbour than others.
    """
    if before is None or after is None or after.total <= before.total:
        return None
    busy = (after.total - before.total) - (after.idle - before.idle)
    return min(max((busy - (after.own - before.own)) / (after.total - before.total), 0.0), 1.0)
