"""How much of the machine others took, from what the system counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from dyexport.bench.machine import CpuTime, cpu_time, taken_by_others

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


def test_counters_are_read_from_the_system(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 20 30 400 50 0 6 0 9 9\ncpu0 1 1 1 1 1 1 1 1 1 1\n")  # the last two are in the first two
    found = cpu_time(stat)
    assert found is not None
    assert found.idle / found.total == pytest.approx(450 / 606)


def test_other_systems_are_unknown(tmp_path: Path) -> None:
    assert cpu_time(tmp_path / "none") is None
    assert taken_by_others(None, START) is None
    assert taken_by_others(START, START) is None
