"""Modulation of many timesteps in one product: right rows, few runs, bounded memory."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dyexport.bundle.tensors import TensorSpec
from dyexport.engines.base import EngineIO, Tensors
from dyexport.engines.fake import FakeEngine
from dyexport.runtime.conditioning import TRAJECTORIES, Conditioner
from tests.engines.tiny import CLASSES, MODULATION, conditioning_io, make_weights, modulate

WEIGHTS = make_weights()
STEPS = [900.0, 600.0, 300.0, 0.0]
ROW_BYTES = MODULATION * 4


class Network(FakeEngine):
    """The conditioning network, which remembers the timesteps of each of its runs."""

    def __init__(self) -> None:
        self.asked: list[list[float]] = []
        super().__init__(conditioning_io(), self._modulate)

    def _modulate(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        self.asked.append(list(dict.fromkeys(inputs["timestep"].tolist())))
        return {"modulation": modulate(WEIGHTS, inputs["timestep"], inputs["class_labels"])}


def make(memory: int = 2**20, *, resident: bool = True) -> tuple[Conditioner, Network]:
    engine = Network()
    return Conditioner(engine, resident=resident, memory=memory), engine


def ask(conditioner: Conditioner, t: float, *labels: int) -> None:
    """One step, checked against the network run for it alone."""
    conditions = {"class_labels": torch.tensor(labels)}
    wanted = modulate(WEIGHTS, torch.full((len(labels),), t), conditions["class_labels"])
    assert torch.equal(conditioner.at(t, conditions), wanted)


def walk(conditioner: Conditioner, *labels: int, steps: list[float] = STEPS) -> None:
    for t in steps:
        ask(conditioner, t, *labels)


def test_the_first_trajectory_is_computed_step_by_step() -> None:
    conditioner, engine = make()
    walk(conditioner, 3)
    assert engine.asked == [[t] for t in STEPS]


def test_a_repeated_trajectory_is_one_product() -> None:
    conditioner, engine = make()
    for labels in ((3, 1), (4, 1), (5, 9)):
        walk(conditioner, *labels)
    assert engine.asked == [*([t] for t in STEPS), STEPS, STEPS]


def test_the_same_conditions_again_need_no_run() -> None:
    conditioner, engine = make()
    walk(conditioner, 3)
    walk(conditioner, 3)
    assert engine.runs == len(STEPS)


def test_labels_changed_in_place_are_new_labels() -> None:
    conditioner, engine = make()
    labels = torch.tensor([3, 3])
    first = conditioner.at(900.0, {"class_labels": labels})
    labels[1] = 7
    second = conditioner.at(900.0, {"class_labels": labels})
    assert engine.runs == 2
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def test_labels_changed_through_numpy_are_new_labels() -> None:
    conditioner, engine = make()
    labels = torch.tensor([3, 3])
    first = conditioner.at(900.0, {"class_labels": labels})
    labels.numpy()[1] = 7
    second = conditioner.at(900.0, {"class_labels": labels})
    assert engine.runs == 2
    assert not torch.equal(first[1], second[1])


@pytest.mark.parametrize("change", ["in place", "through a view", "in inference mode"])
def test_any_change_in_place_is_seen(change: str) -> None:
    conditioner, engine = make()
    with torch.inference_mode(change == "in inference mode"):
        labels = torch.tensor([3, 3])
        conditioner.at(900.0, {"class_labels": labels})
        (labels[1:] if change == "through a view" else labels).fill_(7)
        conditioner.at(900.0, {"class_labels": labels})
    assert engine.runs == 2


def test_the_same_tensor_on_a_device_is_not_read_again() -> None:
    """On the meta device there is nothing to read: comparing values raises."""
    io = EngineIO(
        inputs=(
            TensorSpec(name="timestep", dtype="float32", shape=("rows",)),
            TensorSpec(name="pooled", dtype="float32", shape=("rows", 4)),
        ),
        outputs=(TensorSpec(name="modulation", dtype="float32", shape=("rows", 2)),),
    )
    engine = FakeEngine(io, lambda inputs: {"modulation": torch.zeros(len(inputs["timestep"]), 2)})
    conditioner = Conditioner(engine, device="meta")
    pooled = torch.zeros(3, 4, dtype=torch.float16, device="meta")
    for t in STEPS:
        conditioner.at(t, {"pooled": pooled})
        conditioner.at(t, {"pooled": pooled.expand(3, 4)})
    assert engine.runs == len(STEPS)
    for changed in (pooled.fill_(1), pooled[:2], pooled.clone(), pooled.float()):
        with pytest.raises(NotImplementedError) if changed.shape == (3, 4) else nullcontext():
            conditioner.at(900.0, {"pooled": changed.half()})


def test_conditions_of_any_dtype_are_taken() -> None:
    io = EngineIO(
        inputs=(
            TensorSpec(name="timestep", dtype="float32", shape=("rows",)),
            TensorSpec(name="guidance", dtype="float32", shape=("rows",)),
        ),
        outputs=(TensorSpec(name="modulation", dtype="float32", shape=("rows", 1)),),
    )
    engine = FakeEngine(io, lambda inputs: {"modulation": (inputs["timestep"] + inputs["guidance"])[:, None]})
    conditioner = Conditioner(engine)
    for dtype in (torch.float16, torch.float64, torch.bfloat16, torch.float32):
        assert conditioner.at(8.0, {"guidance": torch.tensor([3.5], dtype=dtype)}).tolist() == [[11.5]]


def test_another_batch_size_is_another_trajectory() -> None:
    conditioner, engine = make()
    walk(conditioner, 3)
    walk(conditioner, 3, 3)
    assert engine.asked[len(STEPS) :] == [STEPS]


def test_a_trajectory_that_starts_later_is_computed_from_there() -> None:
    conditioner, engine = make()
    walk(conditioner, 3)
    walk(conditioner, 4, steps=STEPS[2:])
    assert engine.asked[len(STEPS) :] == [STEPS[2:]]


def test_an_unseen_timestep_is_computed_alone() -> None:
    conditioner, engine = make()
    walk(conditioner, 3)
    ask(conditioner, 850.0, 4)
    ask(conditioner, 600.0, 4)
    ask(conditioner, 450.0, 4)
    assert engine.asked[len(STEPS) :] == [[850.0], STEPS[1:], [450.0]]


def test_two_conditions_may_alternate() -> None:
    """True guidance: prompt and negative prompt, call by call."""
    conditioner, engine = make()
    for labels in ((3, CLASSES), (4, CLASSES)):
        for t in STEPS:
            for label in labels:
                ask(conditioner, t, label)
    assert engine.asked[2 * len(STEPS) :] == [STEPS], "the second prompt's; the empty one's rows are still there"


@given(rows=st.integers(1, 6))
def test_memory_is_bounded(rows: int) -> None:
    batch = 2
    memory = TRAJECTORIES * rows * batch * ROW_BYTES
    conditioner, engine = make(memory)
    for label in (3, 4, 5):
        walk(conditioner, label, label)
        held = sum(row.nbytes for each in conditioner._current for row in each.rows.values())
        assert held <= memory
    assert max(len(asked) for asked in engine.asked) == min(rows, len(STEPS))


def test_the_only_trajectory_has_all_of_the_memory() -> None:
    """Without conditions every sample has the same rows."""
    io = EngineIO(
        inputs=(TensorSpec(name="timestep", dtype="float32", shape=("rows",)),),
        outputs=(TensorSpec(name="modulation", dtype="float32", shape=("rows", 2)),),
    )
    runs = []
    for rows in (len(STEPS), len(STEPS) - 1):
        engine = FakeEngine(io, lambda inputs: {"modulation": inputs["timestep"][:, None].expand(-1, 2)})
        conditioner = Conditioner(engine, memory=rows * 2 * 4)
        for _ in range(3):
            assert [conditioner.at(t, {})[0, 0].item() for t in STEPS] == STEPS
        runs.append(engine.runs)
    assert runs[0] == len(STEPS) < runs[1]


def test_room_for_less_than_a_row_still_works() -> None:
    conditioner, engine = make(memory=1)
    for label in (3, 4):
        walk(conditioner, label)
    assert engine.asked == [[t] for t in STEPS] * 2


@pytest.mark.parametrize("resident", [True, False])
def test_a_resident_engine_stays(resident: bool) -> None:
    conditioner, engine = make(resident=resident)
    for label in (3, 4):
        walk(conditioner, label)
        assert engine.active == resident
    assert engine.runs == len(STEPS) + 1
    assert engine.activations == (1 if resident else engine.runs)


def test_close_frees_the_engine_and_the_rows() -> None:
    conditioner, engine = make()
    walk(conditioner, 3)
    conditioner.close()
    assert not engine.active
    ask(conditioner, 900.0, 3)
    assert engine.runs == len(STEPS) + 1


@given(
    calls=st.lists(
        st.tuples(st.sampled_from(STEPS), st.lists(st.integers(0, CLASSES), min_size=1, max_size=3)), max_size=30
    ),
    rows=st.integers(0, 8),
)
def test_rows_are_right_in_any_order(calls: list[tuple[float, list[int]]], rows: int) -> None:
    conditioner, _ = make(TRAJECTORIES * rows * ROW_BYTES)
    for t, labels in calls:
        ask(conditioner, t, *labels)
