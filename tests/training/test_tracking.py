"""Curves of a training run, in its file and in TensorBoard: complete, without a step twice, whatever stops the run."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dyexport.errors import DyexportError, DyexportWarning, MissingDependencyError, UsageError
from dyexport.training.config import FinetuneConfig
from dyexport.training.finetuning import DynamicTrainer
from dyexport.training.metrics import mean_metrics
from dyexport.training.trackers import TRACKERS, check_installed, check_tracker
from dyexport.training.tracking import METRICS, RECORD, KeptLog, Monitoring, tracker_arguments
from tests.training.helpers import DYNAMIC, SIT, blobs, dynamic, listening_tracker, same, weights

CONFIG = replace(DYNAMIC, steps=40, checkpoint_every=15)
POINTS = [10, 15, 20, 30, 40]  # every ten steps, and where a state is saved
SPEED = "train/samples_per_second"


class Stopped(Exception):
    """A run that ended early."""


def tracked(
    root: Path, tracker: str | None = "tensorboard", config: FinetuneConfig = CONFIG, stop: int | None = None
) -> DynamicTrainer:
    """Return a trainer that raises ``Stopped`` after step ``stop``."""
    model = dynamic(SIT)
    monitoring = Monitoring(directory=root / "curves", tracker=tracker, labels={"data": "blobs"})
    run = DynamicTrainer(model, SIT, blobs(SIT), config, work_dir=root, monitoring=monitoring)
    total = run.total

    def total_or_stop(losses: Any) -> Any:
        if run.step == stop:
            raise Stopped
        return total(losses)

    run.total = total_or_stop  # type: ignore[method-assign]
    return run


def stopped(root: Path, tracker: str | None = "tensorboard", stop: int = 23) -> None:
    with pytest.raises(Stopped):
        tracked(root, tracker, stop=stop).train()


def points(root: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (root / "curves" / METRICS).read_text().splitlines()]


def without_speed(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    assert all(line[SPEED] > 0 for line in lines)
    return [{name: value for name, value in line.items() if name != SPEED} for line in lines]


def curves(root: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the scalars of a run from the event files of TensorBoard: step and value by name."""
    events = EventAccumulator(str(root / "curves"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def as_curves(lines: list[dict[str, float]]) -> dict[str, list[tuple[int, float]]]:
    names = dict.fromkeys(name for line in lines for name in line if name != "step")
    return {
        name: [(int(line["step"]), pytest.approx(line[name], rel=1e-6)) for line in lines if name in line]
        for name in names
    }


def test_curves_have_what_was_trained(tmp_path: Path) -> None:
    run = tracked(tmp_path)
    history = run.train().history
    lines = points(tmp_path)
    assert [line["step"] for line in lines] == POINTS
    assert curves(tmp_path) == as_curves(lines)
    for first, line in zip((0, *POINTS), lines, strict=False):
        last = int(line["step"])
        expected = {f"train/{name}": value for name, value in mean_metrics(history[first:last]).items()}
        expected["train/target"] = CONFIG.target(last - 1)
        expected["train/learning_rate"] = CONFIG.learning_rate * CONFIG.rate_scale(last - 1)
        expected["train/router_learning_rate"] = CONFIG.router_learning_rate * CONFIG.rate_scale(last - 1)
        found = {name: value for name, value in line.items() if name not in ("step", SPEED, "train/gradient_norm")}
        assert found == pytest.approx(expected)
        assert 0 < line["train/gradient_norm"] < math.inf
    assert "train/complete" in lines[0]
    assert "train/complete" not in lines[-1]  # the dense model is no longer trained
    record = json.loads((tmp_path / "curves" / RECORD).read_text())
    assert record["hyperparameters"].items() >= {"budget": 0.5, "seed": 3, "data": "blobs", "model": SIT.name}.items()


def test_tracking_changes_no_weight(tmp_path: Path) -> None:
    plain = DynamicTrainer(dynamic(SIT), SIT, blobs(SIT), DYNAMIC, work_dir=tmp_path / "plain")
    plain.train()
    run = tracked(tmp_path / "tracked", config=DYNAMIC)
    run.train()
    assert same(weights(run.model), weights(plain.model))


def test_a_stopped_run_goes_on_with_its_curves(tmp_path: Path) -> None:
    """The run stops after step 23, of which 20 are in the curves and 15 in the saved state."""
    tracked(tmp_path / "whole").train()
    expected = without_speed(points(tmp_path / "whole"))
    stopped(tmp_path)
    assert [line["step"] for line in points(tmp_path)] == [10, 15, 20]
    with (tmp_path / "curves" / METRICS).open("a") as file:
        file.write('{"step": 30, "train/diff')  # a line that a kill cut
    resumed = tracked(tmp_path)
    steps: list[int] = []
    resumed.progress = lambda step, *_: steps.append(step)
    resumed.train()
    assert steps[0] == 15
    assert without_speed(points(tmp_path)) == expected
    assert curves(tmp_path) == as_curves(points(tmp_path))


def test_a_run_that_starts_over_starts_its_curves_over(tmp_path: Path) -> None:
    stopped(tmp_path, stop=13)  # before the first state
    tracked(tmp_path).train()
    assert [line["step"] for line in points(tmp_path)] == POINTS
    assert curves(tmp_path) == as_curves(points(tmp_path))
    other = tracked(tmp_path, config=replace(CONFIG, seed=4, steps=20, checkpoint_every=20))
    other.train()
    assert [line["step"] for line in points(tmp_path)] == [10, 20]
    assert curves(tmp_path) == as_curves(points(tmp_path))


def test_a_tracker_that_comes_later_gets_the_curves_so_far(tmp_path: Path) -> None:
    stopped(tmp_path, tracker=None)
    assert curves(tmp_path) == {}
    tracked(tmp_path).train()
    assert [line["step"] for line in points(tmp_path)] == POINTS
    assert curves(tmp_path) == as_curves(points(tmp_path))


def test_a_tracker_without_a_way_back_gets_no_step_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = listening_tracker(monkeypatch)
    stopped(tmp_path, "aim")
    assert [step for step, _ in sent] == [10, 15, 20, "finished"]
    sent.clear()
    stopped(tmp_path, "aim", stop=17)
    assert [step for step, _ in sent] == ["finished"]
    sent.clear()
    tracked(tmp_path, "aim").train()
    assert [step for step, _ in sent] == [30, 40, "finished"]


def test_a_tracker_that_fails_does_not_stop_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = listening_tracker(monkeypatch, fails_at=20)
    with pytest.warns(DyexportWarning, match=r"aim failed \(the service is down\); training goes on, and .*metrics"):
        tracked(tmp_path, "aim").train()
    assert [step for step, _ in sent] == [10, 15]
    assert [line["step"] for line in points(tmp_path)] == POINTS


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_ends_a_run_closes_its_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    sent = listening_tracker(monkeypatch)
    run = tracked(tmp_path, "aim")

    def interrupt(step: int, *_: Any) -> None:
        if step == 12:
            raise error

    run.progress = interrupt
    with pytest.raises(error):
        run.train()
    assert [step for step, _ in sent] == [10, "finished"]


def test_a_loss_that_is_not_finite_closes_the_tracker_and_keeps_the_last_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = listening_tracker(monkeypatch)
    run = tracked(tmp_path, "aim")
    total = run.total

    def spoil(losses: Any) -> Any:
        losses.diffusion.data.mul_(math.nan if run.step == 17 else 1.0)
        return total(losses)

    run.total = spoil  # type: ignore[method-assign]
    with pytest.raises(DyexportError, match="loss is nan at step 17"):
        run.train()
    assert [step for step, _ in sent] == [10, 15, "finished"]
    assert [line["step"] for line in points(tmp_path)] == [10, 15]
    resumed = tracked(tmp_path, "aim")
    resumed.resume()
    assert resumed.step == 15


def test_metrics_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    log = KeptLog(Monitoring(directory=tmp_path / "curves"), "run", 0, {})
    log.training(10, 80, {"diffusion": 1.0, "gradient_norm": math.inf})
    log.close()
    assert without_speed(points(tmp_path)) == [{"step": 10, "train/diffusion": 1.0}]


def test_several_budgets_have_a_curve_each(tmp_path: Path) -> None:
    config = replace(CONFIG, budgets=(0.3, 0.6))
    model = dynamic(SIT, budgets=(0.3, 0.6))
    monitoring = Monitoring(directory=tmp_path / "curves")
    DynamicTrainer(model, SIT, blobs(SIT), config, work_dir=tmp_path, monitoring=monitoring).train()
    last = points(tmp_path)[-1]
    assert {name for name in last if "/0." in name} == {
        f"train/{name}/{budget}" for name in ("flops_ratio", "target") for budget in ("0.3", "0.6")
    }
    assert last["train/target/0.3"] == pytest.approx(0.3)
    assert last["train/target/0.6"] == pytest.approx(0.6)


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


def test_trackers_are_those_of_accelerate(tmp_path: Path) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert set(LOGGER_TYPE_TO_CLASS) == set(TRACKERS)
    for name, kind in LOGGER_TYPE_TO_CLASS.items():
        inspect.signature(kind).bind(**tracker_arguments(name, tmp_path, "run", 0))
