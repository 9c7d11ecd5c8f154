"""CPU time that other processes took while something was timed."""

from __future__ import annotations

from dataclasses import dataclass

import psutil


@dataclass(frozen=True, kw_only=True)
class CpuTime:
    """Seconds since boot, over all processors: in total, idle, and spent by this process."""

    total: float
    idle: float
    own: float


def cpu_time() -> CpuTime:
    times, own = psutil.cpu_times()._asdict(), psutil.Process().cpu_times()
    total = sum(seconds for name, seconds in times.items() if not name.startswith("guest"))  # those are in user, nice
    return CpuTime(total=total, idle=times["idle"] + times.get("iowait", 0.0), own=own.user + own.system)


def taken_by_others(before: CpuTime, after: CpuTime) -> float | None:
    """Return the fraction of CPU time used by other processes, in [0, 1]; None if no time passed.

    Unless it is near zero, ratios between backends say little: threads that wait for each other at every operator, as
    torch's do, lose more to other processes than others.
    """
    if after.total <= before.total:
        return None
    busy = (after.total - before.total) - (after.idle - before.idle)
    return min(max((busy - (after.own - before.own)) / (after.total - before.total), 0.0), 1.0)
