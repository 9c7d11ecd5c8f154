"""Trackers of a training run: what they get, whatever stops the run or fails, and the names that are accepted."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from dyexport.errors import DyexportError, DyexportWarning, MissingDependencyError, UsageError
from dyexport.training.trackers import TRACKERS, check_installed, check_tracker, tracker_arguments
from tests.training.helpers import listening_tracker
from tests.training.tracked import POINTS, as_curves, curves, points, stopped, tracked

FAILED = (
    r"aim failed \(the service is down\) and gets no more points; training is not affected, .*metrics.jsonl has all"
)


def test_a_tracker_that_comes_later_gets_the_curves_so_far(tmp_path: Path) -> None:
    stopped(tmp_path, tracker=None)
    assert curves(tmp_path) == {}
    tracked(tmp_path).train()
    assert [line["step"] for line in points(tmp_path)] == POINTS
    assert curves(tmp_path) == as_curves(points(tmp_path))


def test_a_tracker_without_a_way_back_gets_no_step_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got = listening_tracker(monkeypatch)
    stopped(tmp_path, "aim")
    assert [what for what, _ in got] == ["started", 10, 15, 20, "finished"]
    hyperparameters = dict(got[0][1])
    got.clear()
    stopped(tmp_path, "aim", step=17)
    assert got == [("started", hyperparameters), ("finished", None)]  # it shows a resumed run as a new one
    got.clear()
    tracked(tmp_path, "aim").train()
    assert [what for what, _ in got] == ["started", 30, 40, "finished"]


def test_a_tracker_that_fails_does_not_stop_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got = listening_tracker(monkeypatch, fails_at=20)
    with pytest.warns(DyexportWarning, match=FAILED):
        tracked(tmp_path, "aim").train()
    assert [what for what, _ in got] == ["started", 10, 15]
    assert [line["step"] for line in points(tmp_path)] == POINTS


@pytest.mark.parametrize("again", [None, 20], ids=["at once", "after it fails again"])
def test_a_resumed_run_sends_what_a_failed_tracker_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: int | None
) -> None:
    listening_tracker(monkeypatch, fails_at=15)
    with pytest.warns(DyexportWarning, match=FAILED):
        stopped(tmp_path, "aim", step=33)
    if again is not None:
        got = listening_tracker(monkeypatch, fails_at=again)
        with pytest.warns(DyexportWarning, match=FAILED):
            stopped(tmp_path, "aim", step=38)
        assert [what for what, _ in got] == ["started", 15]
    got = listening_tracker(monkeypatch)
    tracked(tmp_path, "aim").train()
    expected = [line for line in points(tmp_path) if line["step"] > (10 if again is None else 15)]
    assert got[1:-1] == [(line.pop("step"), line) for line in expected]


def test_a_tracker_that_does_not_start_ends_the_run_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listening_tracker(monkeypatch, fails_at="started")
    message = r"--tracker aim does not start \(the service is down\); set it up, or train with --tracker none"
    with pytest.raises(DyexportError, match=message):
        tracked(tmp_path, "aim").train()


def test_a_tracker_that_fails_at_the_end_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listening_tracker(monkeypatch, fails_at="finished")
    with pytest.warns(DyexportWarning, match=FAILED):
        stopped(tmp_path, "aim")
    got = listening_tracker(monkeypatch)
    tracked(tmp_path, "aim").train()
    assert [what for what, _ in got] == ["started", 30, 40, "finished"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_ends_a_run_closes_its_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    got = listening_tracker(monkeypatch)
    run = tracked(tmp_path, "aim")

    def interrupt(step: int, *_: Any) -> None:
        if step == 12:
            raise error

    run.progress = interrupt
    with pytest.raises(error):
        run.train()
    assert [what for what, _ in got] == ["started", 10, "finished"]


def test_a_loss_that_is_not_finite_closes_the_tracker_and_keeps_the_last_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    got = listening_tracker(monkeypatch)
    run = tracked(tmp_path, "aim")
    total = run.total

    def spoil(losses: Any) -> Any:
        losses.diffusion.data.mul_(math.nan if run.step == 17 else 1.0)
        return total(losses)

    run.total = spoil  # type: ignore[method-assign]
    with pytest.raises(DyexportError, match="loss is nan at step 17"):
        run.train()
    assert [what for what, _ in got] == ["started", 10, 15, "finished"]
    assert [line["step"] for line in points(tmp_path)] == [10, 15]
    resumed = tracked(tmp_path, "aim")
    resumed.resume()
    assert resumed.step == 15


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbord", "--tracker is 'tensorbord'; did you mean 'tensorboard'?"),
        ("print", "--tracker is 'print'; use one of tensorboard, trackio, wandb"),
    ],
)
def test_an_unknown_tracker_is_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        check_tracker(name)


def test_a_tracker_that_is_not_installed_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed("tensorboard")
    monkeypatch.setattr("dyexport.training.trackers.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"run: pip install 'dyexport\[tracking\]'"):
        check_installed("tensorboard")
    with pytest.raises(MissingDependencyError, match="swanlab is not installed; run: pip install swanlab"):
        check_installed("swanlab")


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "aim", "dvclive", "swanlab"])
def test_files_of_trackers_are_in_the_folder_of_the_run(name: str, tmp_path: Path) -> None:
    """Those that write files would otherwise write them to the current directory, over those of another run."""
    values = tracker_arguments(name, tmp_path / "run", "id", 0).values()
    assert any(Path(str(value)).is_relative_to(tmp_path) for value in values)


def test_trackers_are_those_of_accelerate(tmp_path: Path) -> None:
    assert set(LOGGER_TYPE_TO_CLASS) == set(TRACKERS)
    for name, kind in LOGGER_TYPE_TO_CLASS.items():
        inspect.signature(kind).bind(**tracker_arguments(name, tmp_path, "run", 0))
