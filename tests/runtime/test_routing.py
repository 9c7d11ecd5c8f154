"""From t to segment, gates and slots."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dyexport.errors import BundleError, EngineMismatchError
from dyexport.runtime.routing import RouteCache, dense_route, route, shared_timestep
from tests.engines.tiny import DEPTH, FEATURES
from tests.runtime.bundles import ROWS, make_plan, make_stats, make_widths

WIDTHS, STATS = make_widths(1000.0), make_stats(1000.0)


@given(t=st.floats(0, 1000), segments=st.integers(1, ROWS))
def test_every_t_has_its_masks(t: float, segments: int) -> None:
    plan = make_plan(WIDTHS, segments)
    found = route(plan, WIDTHS, STATS, t)
    segment = plan.segments[found.segment]
    assert segment.start <= t <= segment.end
    assert WIDTHS.grid[found.row] <= t
    assert (found.gate is None) == (segment.gate_size == 0)
    if found.gate is not None:
        on = [
            table[found.row, block, list(kept[block])]
            for block in range(DEPTH)
            for table, kept in ((WIDTHS.heads, segment.heads), (WIDTHS.groups, segment.groups))
        ]
        np.testing.assert_array_equal(found.gate, np.concatenate(on))


def test_segments_change_exactly_at_their_bounds() -> None:
    plan = make_plan(WIDTHS, 2)
    assert [route(plan, WIDTHS, None, t).segment for t in (0.0, np.nextafter(500.0, 0), 500.0, 1000.0)] == [0, 0, 1, 1]


@pytest.mark.parametrize("t", [-1.0, 1000.5, float("nan")])
def test_t_out_of_range_is_refused(t: float) -> None:
    with pytest.raises(EngineMismatchError, match="outside"):
        route(make_plan(WIDTHS, 2), WIDTHS, None, t)


@pytest.mark.parametrize(("path", "limits"), [("all", ()), ("masked", ()), ("compact", ()), ("capacity", (3,) * DEPTH)])
def test_token_limits(path: str, limits: tuple[int, ...]) -> None:
    found = route(make_plan(WIDTHS, 2, path, 3), WIDTHS, STATS, 0.0)
    assert found.token_limits == limits
    assert found.slots is None


def test_only_blocks_with_limited_room_have_limits() -> None:
    plan = make_plan(WIDTHS, 1, "dynamic", 2)
    mixed = {"token_paths": ("masked", "dynamic"), "capacities": (7, 2)}
    plan = plan.model_copy(update={"segments": (plan.segments[0].model_copy(update=mixed),)})
    found = route(plan, WIDTHS, STATS, 250.0)
    assert found.slots == 2
    assert found.token_limits == (2 + 2,)


def test_slots_follow_the_token_counts() -> None:
    plan = make_plan(WIDTHS, 2, "dynamic", 2)
    routes = [route(plan, WIDTHS, STATS, t) for t in (0.0, 250.0, 500.0, 1000.0)]
    assert [found.slots for found in routes] == [1, 2, 4, 8]
    assert [found.token_limits[0] for found in routes] == [3, 4, 6, 10]
    assert all(
        found.token_limits[0] >= STATS.highest(t, t)[0] for found, t in zip(routes, (0, 250, 500, 1000), strict=True)
    )


def test_slots_without_statistics_are_refused() -> None:
    with pytest.raises(BundleError, match="token statistics"):
        route(make_plan(WIDTHS, 2, "dynamic", 2), WIDTHS, None, 0.0)


def test_steps_are_cached() -> None:
    calls = []

    def find(t: float) -> object:
        calls.append(t)
        return dense_route(t)

    routes = RouteCache(find)  # type: ignore[arg-type]
    assert routes.at(1.0) is routes.at(1.0)
    assert calls == [1.0]


def test_step_tensors() -> None:
    plan = make_plan(WIDTHS, 2, "dynamic", 2)
    step = RouteCache(lambda t: route(plan, WIDTHS, STATS, t)).at(900.0)
    assert step.choice.engine == 1
    assert step.choice.inputs["width_gate"].shape == (plan.segments[1].gate_size,)
    assert step.choice.inputs["slots"].shape == (8,)
    assert step.token_limits is not None
    assert step.token_limits.tolist() == [10, 10]
    assert FEATURES == 8


@pytest.mark.parametrize(
    "timestep",
    [7, 7.0, torch.tensor(7), torch.tensor([7]), torch.full((3,), 7), torch.full((3,), 7.0, dtype=torch.float64)],
)
def test_one_t_in_many_forms(timestep: torch.Tensor | float) -> None:
    assert shared_timestep(timestep, 3) == 7.0


def test_t_is_rounded_as_the_network_will_see_it() -> None:
    assert shared_timestep(torch.tensor(0.1, dtype=torch.float64), 1) == float(np.float32(0.1))


def test_mixed_timesteps_are_refused_by_name() -> None:
    with pytest.raises(EngineMismatchError, match="not at 3, 500; call once for each"):
        shared_timestep(torch.tensor([500, 3, 500]), 3)


def test_wrong_number_of_timesteps_is_refused() -> None:
    with pytest.raises(EngineMismatchError, match="2 values for a batch of 3"):
        shared_timestep(torch.tensor([5, 5]), 3)
