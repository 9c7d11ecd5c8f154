"""Engines are activated when they are needed or about to be, and no more than allowed at a time."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dyexport.engines.base import Tensors
from dyexport.engines.fake import FakeEngine
from dyexport.engines.switching import EngineChoice, SwitchingEngine
from dyexport.errors import EngineBuildError, UsageError
from tests.engines.tiny import make_inputs, t_of, tiny_io, whole_segment

IO = tiny_io(whole_segment(gated=False))


def fake(index: int) -> FakeEngine:
    def function(inputs: Tensors) -> dict[str, torch.Tensor]:
        return {"sample": inputs["hidden_states"] * index}

    return FakeEngine(IO, function)


def make(count: int, ahead: int = 1, max_resident: int | None = None) -> tuple[SwitchingEngine, list[FakeEngine]]:
    """Engine i serves t = i."""
    engines = [fake(index) for index in range(count)]
    choose = lambda inputs: EngineChoice(engine=int(t_of(inputs)), inputs={})  # noqa: E731
    return SwitchingEngine(engines, choose, ahead=ahead, max_resident=max_resident), engines


def run_at(switching: SwitchingEngine, index: int) -> torch.Tensor:
    return switching.run(make_inputs(1, t=float(index)))["sample"]


def active(engines: list[FakeEngine]) -> list[int]:
    return [index for index, engine in enumerate(engines) if engine.active]


def test_runs_the_chosen_engine() -> None:
    switching, engines = make(3)
    for index in (0, 2, 1):
        torch.testing.assert_close(run_at(switching, index), make_inputs(1)["hidden_states"] * index)
    assert [engine.runs for engine in engines] == [1, 1, 1]


@pytest.mark.parametrize(("ahead", "start", "then"), [(1, 0, 1), (-1, 3, 2)])
def test_prefetches_in_the_direction_of_sampling(ahead: int, start: int, then: int) -> None:
    switching, engines = make(4, ahead)
    run_at(switching, start)
    switching._settle()
    assert active(engines) == sorted([start, then])
    run_at(switching, then)
    assert engines[then].activations == 1


def test_prefetch_overlaps_the_run() -> None:
    started = threading.Event()

    class Slow(FakeEngine):
        def activate(self) -> None:
            super().activate()
            started.set()

    def waits(inputs: Tensors) -> dict[str, torch.Tensor]:
        assert started.wait(10), "the next engine must be activated while this one runs"
        return {}

    switching = SwitchingEngine([FakeEngine(IO, waits), Slow(IO, dict)], lambda _: EngineChoice(engine=0, inputs={}))
    switching.run(make_inputs(1))


def test_a_switch_waits_for_its_engine_to_be_prefetched() -> None:
    release, entered = threading.Event(), []

    class Slow(FakeEngine):
        def activate(self) -> None:
            if not self.active:
                entered.append(threading.current_thread().name)
                assert release.wait(10)
            super().activate()

    engines = [fake(0), Slow(IO, dict)]
    switching = SwitchingEngine(engines, lambda inputs: EngineChoice(engine=int(t_of(inputs)), inputs={}))
    run_at(switching, 0)
    threading.Timer(0.05, release.set).start()
    switching.run(make_inputs(1, t=1.0))
    assert len(entered) == 1
    assert entered[0].startswith("prefetch")


@pytest.mark.parametrize(("ahead", "first"), [(1, 0), (-1, 2)])
def test_activate_starts_where_sampling_does(ahead: int, first: int) -> None:
    switching, engines = make(3, ahead)
    switching.activate()
    assert active(engines) == [first]


@given(
    walk=st.lists(st.integers(0, 5), min_size=1, max_size=20), limit=st.integers(1, 6), ahead=st.sampled_from([1, -1])
)
def test_never_more_than_allowed(walk: list[int], limit: int, ahead: int) -> None:
    switching, engines = make(6, ahead, limit)
    for index in walk:
        torch.testing.assert_close(run_at(switching, index), make_inputs(1)["hidden_states"] * index)
        switching._settle()
        assert engines[index].active
        assert len(active(engines)) <= limit
    assert sum(switching.clock.activations) == sum(engine.activations for engine in engines)
    switching.close()
    assert active(engines) == []


def test_the_one_used_longest_ago_makes_room() -> None:
    switching, engines = make(5, max_resident=2)
    switching._ahead = 10  # no prefetch
    for index in (0, 2, 0, 4):
        run_at(switching, index)
    assert active(engines) == [0, 4]


def test_what_makes_room_is_parked_and_closed_at_the_end() -> None:
    switching, engines = make(3, max_resident=1)
    for index in (0, 1, 2, 0):
        run_at(switching, index)
    assert [engine.parks for engine in engines] == [1, 1, 1]
    assert [engine.parked for engine in engines] == [False, True, True]
    assert sum(engine.closes for engine in engines) == 0
    switching.close()
    assert [engine.closes for engine in engines] == [1, 1, 1]


def test_prefetch_never_parks_the_engine_that_runs() -> None:
    switching, engines = make(3, max_resident=2)
    for index in (0, 1, 2, 0, 1, 2):
        run_at(switching, index)
    switching._settle()
    assert sum(engine.runs for engine in engines) == 6
    assert all(engine.activations <= 2 for engine in engines)


def test_switches_are_counted_and_timed() -> None:
    switching, _ = make(2)
    for index in (0, 0, 1, 1, 0):
        run_at(switching, index)
    counts = {pair: cost.count for pair, cost in switching.clock.switches.items()}
    assert counts == {(None, 0): 1, (0, 1): 1, (1, 0): 1}
    assert switching.clock.run_seconds > 0
    assert all(cost.seconds > 0 for cost in switching.clock.switches.values())


def test_a_failed_prefetch_is_heard_when_its_engine_is_needed() -> None:
    class Broken(FakeEngine):
        def activate(self) -> None:
            raise EngineBuildError("no")

    engines = [fake(0), Broken(IO, dict)]
    switching = SwitchingEngine(engines, lambda inputs: EngineChoice(engine=int(t_of(inputs)), inputs={}))
    run_at(switching, 0)
    run_at(switching, 0)
    with pytest.raises(EngineBuildError, match="no"):
        run_at(switching, 1)
    run_at(switching, 0)


def test_routed_inputs_are_not_asked_of_the_caller() -> None:
    gated = tiny_io(whole_segment())
    inner = FakeEngine(gated, lambda inputs: {"sample": inputs["width_gate"]})
    gate = torch.ones(whole_segment().gate_size)
    switching = SwitchingEngine([inner], lambda _: EngineChoice(engine=0, inputs={"width_gate": gate}))
    assert switching.io == IO
    assert torch.equal(switching.run(make_inputs(1))["sample"], gate)


@pytest.mark.parametrize("limit", [0, -1])
def test_at_least_one_engine_is_resident(limit: int) -> None:
    with pytest.raises(UsageError, match=str(limit)):
        make(2, max_resident=limit)
