"""Segments: cover, optimality against brute force, unions, gates, token paths."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dyexport.bundle.plan import Segment
from dyexport.bundle.tables import TokenStats, WidthTable
from dyexport.calibration.segments import PlanSettings, make_segments, price_plan
from dyexport.errors import UsageError
from tests.factories import uniform_flops

FLOPS = uniform_flops(depth=2, attention=3.0, mlp=5.0, static=1.0, router=0.1)


def random_table(seed: int, rows: int) -> WidthTable:
    rng = np.random.default_rng(seed)
    heads, groups = rng.random((rows, 2, 4)) < 0.5, rng.random((rows, 2, 4)) < 0.5
    heads[..., 0] = groups[..., 0] = True
    grid = np.sort(rng.choice(np.arange(1, 1000), rows, replace=False)).astype(float)
    grid[0] = 0.0
    return WidthTable(grid=grid, end=1000.0, heads=heads, groups=groups)


def token_stats(low: float = 3.0, high: float = 7.0) -> TokenStats:
    grid = np.linspace(50, 950, 10)
    peak = np.linspace(low, high, 10)[:, None].repeat(2, axis=1)  # (T, L)
    counts = np.stack([np.floor(peak - 1), np.ceil(peak)], axis=-1)
    return TokenStats(grid=grid, levels=np.array([0.5, 1.0]), counts=counts, mean=peak - 0.5, tokens=10)


def cost_of(table: WidthTable, cuts: tuple[float, ...]) -> float:
    """Expected FLOPs of a cover, straight from the definition."""
    total = 0.0
    for start, end in pairwise(cuts):
        rows = [i for i, t in enumerate(table.grid) if start <= t < end]
        heads = table.heads[rows].any(axis=0).mean(axis=-1)
        groups = table.groups[rows].any(axis=0).mean(axis=-1)
        total += float(FLOPS.dynamic(heads, groups, np.ones(2))) * (end - start)
    return total


@given(seed=st.integers(0, 10_000), rows=st.integers(1, 9), engines=st.integers(1, 4))
def test_segments_are_optimal_and_cover(seed: int, rows: int, engines: int) -> None:
    table = random_table(seed, rows)
    segments = make_segments(table, None, FLOPS, PlanSettings(engines=engines))
    cuts = (segments[0].start, *(segment.end for segment in segments))
    assert len(segments) == min(engines, rows)
    assert (cuts[0], cuts[-1]) == (0.0, 1000.0)
    inner = combinations(table.grid[1:], len(segments) - 1)
    best = min(cost_of(table, (0.0, *chosen, 1000.0)) for chosen in inner)
    assert cost_of(table, cuts) == pytest.approx(best)


@given(seed=st.integers(0, 10_000), engines=st.integers(1, 5))
def test_gates_select_exactly_the_units_that_are_on(seed: int, engines: int) -> None:
    table = random_table(seed, 8)
    for segment in make_segments(table, None, FLOPS, PlanSettings(engines=engines)):
        for row in range(table.row(segment.start), int(np.searchsorted(table.grid, segment.end))):
            gate, position = segment.width_gate(table, row), 0
            assert gate.shape == (segment.gate_size,)
            for block in range(2):
                for kept, gated, masks in (
                    (segment.heads[block], segment.gated_heads[block], table.heads[row, block]),
                    (segment.groups[block], segment.gated_groups[block], table.groups[row, block]),
                ):
                    values = gate[position : position + len(kept)] if gated else np.ones(len(kept))
                    position += len(kept) if gated else 0
                    on = {unit for unit, value in zip(kept, values, strict=True) if value == 1}
                    assert on == set(np.flatnonzero(masks))


def test_one_row_needs_no_gate() -> None:
    segments = make_segments(random_table(3, 5), None, FLOPS, PlanSettings(engines=5))
    assert [segment.gate_size for segment in segments] == [0] * 5


@pytest.mark.parametrize("path", ["capacity", "dynamic"])
def test_slots_hold_the_largest_count_seen(path: str) -> None:
    stats, table = token_stats(), random_table(0, 6)
    settings = PlanSettings(engines=3, token_path=path)
    for segment in make_segments(table, stats, FLOPS, settings):
        for t in np.linspace(segment.start, segment.end - 1e-6, 50):
            extra = segment.slots(stats, t) if path == "dynamic" else 0
            capacity = np.array(segment.capacities) + extra
            assert (capacity >= stats.highest(t, t)).all()
            assert (capacity <= stats.tokens).all()
        if path == "dynamic":
            widest = np.array(segment.capacities) + segment.slot_buckets[-1]
            assert (widest <= stats.tokens).all()


def test_auto_never_drops_a_token() -> None:
    segments = make_segments(random_table(0, 6), token_stats(9.0, 10.0), FLOPS, PlanSettings(engines=2))
    assert {path for segment in segments for path in segment.token_paths} <= {"masked", "compact"}


def test_more_engines_never_cost_more() -> None:
    table, stats = random_table(1, 40), token_stats()
    executed = []
    for engines in (1, 2, 4, 8, 16):
        segments = make_segments(table, stats, FLOPS, PlanSettings(engines=engines))
        plan = price_plan(segments, table, stats, FLOPS, disk_bytes=0, resident_bytes=0)
        executed.append(plan.executed_flops_ratio)
        assert plan.network_flops_ratio <= plan.executed_flops_ratio + 1e-3
    assert executed == sorted(executed, reverse=True)


def test_bad_settings_name_the_value() -> None:
    with pytest.raises(UsageError, match="--engines is 0"):
        PlanSettings(engines=0)
    with pytest.raises(UsageError, match="'sparse'"):
        PlanSettings(engines=1, token_path="sparse")


def test_segment_lists_must_agree() -> None:
    with pytest.raises(ValueError, match="one entry per block"):
        Segment(
            start=0, end=1, heads=((0,),), groups=((0,), (0,)), gated_heads=(False,), gated_groups=(False,),
            token_paths=("all",), capacities=(1,),
        )  # fmt: skip
