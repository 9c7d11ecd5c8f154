"""Curves of a training run, in its file and in TensorBoard: complete, without a step twice, whatever stops the run."""

from __future__ import annotations

import json
import math
import os
import resource
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from dyexport.errors import StorageError
from dyexport.files import remove, write_atomically
from dyexport.training.finetuning import DynamicTrainer
from dyexport.training.metrics import mean_metrics
from dyexport.training.tracking import METRICS, RECORD, Monitoring, opened_log
from tests.pipeline.faults import Writes, each_write
from tests.training.helpers import DYNAMIC, SIT, blobs, dynamic, listening_tracker, same, weights
from tests.training.tracked import (
    CONFIG,
    POINTS,
    SPEED,
    as_curves,
    curves,
    points,
    remembering_tracker,
    stopped,
    tracked,
    without_speed,
)


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
    stopped(tmp_path, step=13)  # before the first state
    tracked(tmp_path).train()
    assert [line["step"] for line in points(tmp_path)] == POINTS
    assert curves(tmp_path) == as_curves(points(tmp_path))
    other = tracked(tmp_path, config=replace(CONFIG, seed=4, steps=20, checkpoint_every=20))
    other.train()
    assert [line["step"] for line in points(tmp_path)] == [10, 20]
    assert curves(tmp_path) == as_curves(points(tmp_path))


def test_metrics_that_are_not_finite_are_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation without a finite metric is known to be made, so a resumed run does not repeat it."""
    got = listening_tracker(monkeypatch)
    monitoring = Monitoring(directory=tmp_path / "curves", tracker="aim")
    with opened_log(monitoring, "run", 0, {}) as log:
        log.training(10, 80, {"diffusion": 1.0, "gradient_norm": math.inf})
        log.evaluation(10, {"diffusion": math.nan}, None)
    train, evaluation = points(tmp_path)
    assert train.items() >= {"step": 10, "train/diffusion": 1.0, "train/gradient_norm": None}.items()
    assert evaluation == {"step": 10, "evaluation/diffusion": None}
    assert [(what, set(values)) for what, values in got[1:-1]] == [(10, {"train/diffusion", SPEED}), (10, set())]
    with opened_log(monitoring, "run", 10, {}) as log:
        assert log.evaluated == 10


def test_a_full_disk_ends_the_run_with_the_cure_and_a_resumed_one_has_every_point(tmp_path: Path) -> None:
    monitoring = Monitoring(directory=tmp_path / "curves")
    metrics, limits = monitoring.directory / METRICS, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        """Log until a line no longer fits."""
        with opened_log(monitoring, "run", 0, {}) as log:
            log.training(10, 80, {"diffusion": 1.0})
            resource.setrlimit(resource.RLIMIT_FSIZE, (metrics.stat().st_size + 20, limits[1]))
            log.training(20, 80, {"diffusion": 2.0})

    try:
        with pytest.raises(StorageError, match=r"metrics.jsonl: .*; make room"):
            fill()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not metrics.read_bytes().endswith(b"\n")
    with opened_log(monitoring, "run", 10, {}) as log:
        log.training(20, 80, {"diffusion": 3.0})
    assert [(line["step"], line["train/diffusion"]) for line in points(tmp_path)] == [(10, 1.0), (20, 3.0)]


@pytest.mark.parametrize("damage", [b'{"step": 1', b"\0\0\0", b"\xff\n"])
def test_damaged_lines_are_left_out(tmp_path: Path, damage: bytes) -> None:
    stopped(tmp_path)
    before = points(tmp_path)
    with (tmp_path / "curves" / METRICS).open("ab") as file:
        file.write(damage)
    tracked(tmp_path).train()
    assert [line["step"] for line in points(tmp_path)] == POINTS
    assert points(tmp_path)[:2] == before[:2]


def test_points_are_on_the_disk_before_a_state_that_follows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that loses power keeps only what was synced."""
    run = tracked(tmp_path)
    synced: list[tuple[str, int]] = []
    fsync = os.fsync

    def listen(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        kind = (
            "points" if path == tmp_path / "curves" / METRICS else "state" if path.name.endswith(run.path.name) else ""
        )
        synced.extend([(kind, run.step)] if kind else [])
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", listen)
    run.train()
    assert synced == [(kind, step) for step in (15, 30, 40) for kind in ("points", "state")]


@pytest.mark.build
def test_a_run_that_is_killed_at_any_write_goes_on_with_its_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tracker, which has no way back, has every point too; one of them twice at most."""
    root, got = tmp_path / "root", tmp_path / "got"
    monitoring, state = Monitoring(directory=root / "curves", tracker="aim"), root / "state"
    remembering_tracker(monkeypatch, got)

    def work(writes: Writes | None = None) -> None:
        """Do what a trainer of four steps does, which saves its state and is evaluated after every second one."""
        step = int(state.read_text()) if state.exists() else 0
        with opened_log(monitoring, "run", step, {}) as log:
            while True:
                if step % 2 == 0 and log.evaluated < step:
                    log.evaluation(step, {"diffusion": float(step)}, Image.new("RGB", (2, 2)))
                if step == 4:
                    return
                step += 1
                log.training(step, 8, {"diffusion": float(step)})
                if step % 2 == 0:
                    log.sync()
                    write_atomically(state, str(step).encode())

    def reset() -> None:
        remove(root)
        remove(got)

    kills = 0
    for change, end in each_write(root, "kill", work, reset):
        assert end == "killed"
        work()
        assert [
            (line["step"], *line.keys() & {"train/diffusion", "evaluation/diffusion"}) for line in points(root)
        ] == [
            (0, "evaluation/diffusion"),
            (1, "train/diffusion"),
            (2, "train/diffusion"),
            (2, "evaluation/diffusion"),
            (3, "train/diffusion"),
            (4, "train/diffusion"),
            (4, "evaluation/diffusion"),
        ], change
        sent = got.read_text().splitlines()
        assert set(sent) == {f"{line['step']} {[*line][1]}" for line in points(root)}, change
        assert len(sent) <= len(set(sent)) + 1, change
        kills += 1
    assert kills > 20


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
