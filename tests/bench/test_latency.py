"""Timing is deterministic given its clock: order of calls, what is timed, which percentile."""

from __future__ import annotations

from collections import defaultdict

import pytest

from dyexport.bench.latency import Blocks, time_variants, waiting_clock
from dyexport.bench.statistics import over_trajectory
from dyexport.errors import UsageError


class Machine:
    """A clock that variants move; each call of a variant costs the next of its durations."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def clock(self) -> float:
        return self.now

    def variant(self, name: str, durations: list[float]) -> tuple[str, object]:
        counts: dict[str, int] = defaultdict(int)

        def run() -> None:
            self.calls.append(name)
            self.now += durations[counts[name] % len(durations)]
            counts[name] += 1

        return name, run


def test_variants_run_in_alternating_blocks() -> None:
    machine = Machine()
    variants = dict([machine.variant("a", [1.0]), machine.variant("b", [2.0])])
    time_variants(variants, Blocks(rounds=2, timed=2, warmup=1), clock=machine.clock)
    assert "".join(machine.calls) == "aaabbb" * 2


def test_warm_up_runs_are_not_timed() -> None:
    machine = Machine()
    variants = dict([machine.variant("a", [100.0, 1.0, 1.0])])
    assert time_variants(variants, Blocks(rounds=3, timed=2, warmup=1), clock=machine.clock) == {"a": 1.0}


def test_result_is_the_25th_percentile_of_all_rounds() -> None:
    machine = Machine()
    variants = dict([machine.variant("a", [5.0, 1.0, 4.0, 2.0, 3.0])])
    found = time_variants(variants, Blocks(rounds=5, timed=1, warmup=0), clock=machine.clock)
    assert found["a"] == pytest.approx(2.0)


def test_progress_counts_blocks() -> None:
    seen: list[tuple[int, int]] = []
    time_variants({"a": int, "b": int}, Blocks(rounds=2), progress=lambda *call: seen.append(call))
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4)]


def test_a_clock_waits_for_the_device_before_it_is_read() -> None:
    """A call returns before the device is done; the time until then counts."""
    machine = Machine()
    queue: list[float] = []

    def wait() -> None:
        machine.calls.append("wait")
        machine.now += sum(queue)
        queue.clear()

    clock = waiting_clock(wait, machine.clock)
    assert time_variants({"a": lambda: queue.append(3.0)}, Blocks(rounds=2, timed=2, warmup=1), clock=clock)["a"] == 3.0
    assert machine.calls == ["wait"] * 2 * 4


def test_no_rounds_is_bad_usage() -> None:
    with pytest.raises(UsageError, match="--rounds is 0"):
        Blocks(rounds=0)


def test_trajectory_time_weighs_segments_by_their_share() -> None:
    assert over_trajectory([0.25, 0.75], [4.0, 1.0]) == pytest.approx(1.75)
