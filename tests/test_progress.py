"""Time left, by a clock that the test turns."""

from __future__ import annotations

import pytest

from dyexport.progress import Pace, clock_time, count


class Clock:
    """A clock whose seconds the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def run(pace: Pace, clock: Clock, steps: range, total: int, seconds: float) -> None:
    """Report steps that take ``seconds`` each."""
    for step in steps:
        clock.now += seconds
        pace.advance(step, total)


@pytest.mark.parametrize("seconds", [0.001, 1.0, 29.0, 31.0, 1680.0])
def test_time_left_is_known_after_one_step_however_long_it_is(clock: Clock, seconds: float) -> None:
    pace = Pace(clock)
    pace.advance(0, 100)
    assert pace.left is None
    run(pace, clock, range(1, 2), 100, seconds)
    assert pace.left == pytest.approx(99 * seconds)
    run(pace, clock, range(2, 41), 100, seconds)
    assert pace.left == pytest.approx(60 * seconds)


def test_time_left_falls_between_reports_and_not_below_nothing(clock: Clock) -> None:
    pace = Pace(clock)
    pace.advance(0, 10)
    run(pace, clock, range(1, 2), 10, 60.0)
    clock.now += 40
    assert pace.left == pytest.approx(9 * 60 - 40)
    clock.now += 10_000
    assert pace.left == 0


def test_what_a_stopped_run_did_says_nothing_of_speed(clock: Clock) -> None:
    pace = Pace(clock)
    clock.now += 50  # reading the model
    pace.advance(900, 1000)
    assert pace.left is None
    run(pace, clock, range(901, 911), 1000, 3.0)
    assert pace.left == pytest.approx(90 * 3.0)


def test_another_phase_starts_over(clock: Clock) -> None:
    pace = Pace(clock)
    pace.advance(0, 8)
    run(pace, clock, range(1, 9), 8, 1.0)
    assert pace.left == 0
    for total in (2500, 2500):
        pace.advance(0, total)
        assert pace.left is None
        run(pace, clock, range(1, 11), total, 7.0)
        assert pace.left == pytest.approx((total - 10) * 7.0)


def test_time_left_follows_the_latest_speed(clock: Clock) -> None:
    pace = Pace(clock)
    pace.advance(0, 10_000)
    run(pace, clock, range(1, 2001), 10_000, 2.0)
    run(pace, clock, range(2001, 2201), 10_000, 1.0)  # the complete model is no longer trained
    assert pace.left == pytest.approx(7800 * 1.0)


def test_nothing_is_known_of_what_has_no_end(clock: Clock) -> None:
    pace = Pace(clock)
    assert pace.left is None
    clock.now += 75
    assert str(pace) == "1:15 elapsed"


def test_numbers_are_said_in_one_line(clock: Clock) -> None:
    pace = Pace(clock)
    pace.advance(0, 256)
    run(pace, clock, range(1, 33), 256, 10.0)
    assert str(pace) == "12 %, 32 of 256, 5:20 elapsed, 37:20 left"


def test_times_and_counts() -> None:
    times = {
        0.4: "0:00",
        59.6: "1:00",
        754: "12:34",
        25_689: "7:08:09",
        90_000: "1 day 1:00:00",
        180_000: "2 days 2:00:00",
    }
    assert {seconds: clock_time(seconds) for seconds in times} == times
    counts = {7: "7", 150_000: "150000", 18_800_000_000: "18.8 G", 1_500_000: "1.5 M"}
    assert {value: count(value) for value in counts} == counts
