"""Percentiles and ratios of recorded times, without a clock."""

from __future__ import annotations

import numpy as np
import pytest

from dyexport.bench.statistics import Timing, over_trajectory, ratio, with_conditioning

STEADY = Timing.of([[2.0, 2.1]] * 6)


def test_percentiles_are_over_all_calls_and_rounds_have_a_median_each() -> None:
    timing = Timing.of([[4.0, 1.0, 1.0], [2.0, 3.0, 9.0]])
    calls = [1.0, 1.0, 2.0, 3.0, 4.0, 9.0]
    assert (timing.p25, timing.p50, timing.p90, timing.p99) == pytest.approx(np.percentile(calls, [25, 50, 90, 99]))
    assert timing.rounds == (1.0, 3.0)


def test_a_step_is_the_sum_of_its_parts() -> None:
    engine, conditioning = Timing.of([[2.0], [4.0]]), Timing.of([[10.0], [20.0]])
    step = with_conditioning({"segment 0": engine, "conditioning": conditioning}, steps=10)["segment 0"]
    assert step.rounds == pytest.approx((3.0, 6.0))
    assert step.p50 == pytest.approx(3.0 + 1.5)


def test_a_trajectory_weighs_engines_by_their_share() -> None:
    mean = over_trajectory([1, 3], [Timing.of([[4.0], [8.0]]), Timing.of([[8.0], [4.0]])])
    assert mean.rounds == pytest.approx((7.0, 5.0))


def test_a_ratio_is_of_the_25th_percentiles() -> None:
    found = ratio(STEADY * 3, STEADY)
    assert found.value == pytest.approx(3.0)
    assert found.trusted
    assert str(found) == "3.00x"


def test_rounds_that_agree_are_trusted_however_slow_the_machine_became() -> None:
    """Both variants of a round are slowed alike: the ratio stays."""
    slowed = Timing.of([[2.0], [4.0], [8.0], [2.0]])
    assert ratio(slowed * 2, slowed).value == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("rounds", "low", "high"),
    [
        ([1.0, 1.5, 2.0, 2.5, 3.0], 1.5, 2.5),  # quartiles far apart
        ([2.0, 2.0, 2.1], 2.0, 2.1),  # too few for quartiles
        ([2.0], 2.0, 2.0),
    ],
)
def test_other_ratios_are_a_range_and_no_number(rounds: list[float], low: float, high: float) -> None:
    found = ratio(Timing.of([[value] for value in rounds]), Timing.of([[1.0]] * len(rounds)))
    assert (found.value, found.low, found.high) == (None, pytest.approx(low), pytest.approx(high))
    assert not found.trusted
    assert str(found) == f"not trusted ({low:.2f}x to {high:.2f}x)"


def test_one_disturbed_round_of_ten_does_not_spoil_a_ratio() -> None:
    base = Timing.of([[1.0]] * 10)
    disturbed = Timing.of([[2.0]] * 9 + [[20.0]])
    assert ratio(disturbed, base).value == pytest.approx(2.0)
