"""How much of the machine others took, from what the system counts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dyexport.bench.machine import CpuTime, cpu_time, taken_by_others

STAT = Path("/proc/stat")
TICK = 1 / os.sysconf("SC_CLK_TCK")
START = CpuTime(total=100, idle=50, own=7)


@pytest.mark.parametrize(
    ("total", "idle", "own", "others"),
    [
        (120, 50, 27, 0.0),  # all ours
        (120, 60, 17, 0.0),  # ours and nobody's
        (120, 50, 17, 0.5),
        (120, 55, 7, 0.75),
        (120, 70, 8, 0.0),  # clocks disagree: no share is negative
    ],
)
def test_what_is_neither_ours_nor_idle_is_theirs(total: float, idle: float, own: float, others: float) -> None:
    assert taken_by_others(START, CpuTime(total=total, idle=idle, own=own)) == pytest.approx(others)


@pytest.mark.skipif(not STAT.exists(), reason="the system has no /proc/stat to compare with")
def test_counters_are_the_systems() -> None:
    """The last two numbers, of guests, are in the first two."""
    before = counters()
    seen = cpu_time()
    after = counters()
    assert before[0] - TICK <= seen.total <= after[0] + TICK
    assert before[1] - TICK <= seen.idle <= after[1] + TICK
    assert 0 < seen.own < seen.total


def counters() -> tuple[float, float]:
    """Seconds in total, and idle."""
    fields = [int(field) * TICK for field in STAT.read_text().split("\n", 1)[0].split()[1:9]]
    return sum(fields), fields[3] + fields[4]


def test_no_time_is_no_share() -> None:
    assert taken_by_others(START, START) is None
