"""Training runs that keep their curves, and readers of these."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dyexport.training.config import FinetuneConfig
from dyexport.training.finetuning import DynamicTrainer
from dyexport.training.tracking import METRICS, Monitoring
from tests.training.helpers import DYNAMIC, SIT, Stopped, blobs, dynamic, stop

CONFIG = replace(DYNAMIC, steps=40, checkpoint_every=15)
POINTS = [10, 15, 20, 30, 40]  # every ten steps, and where a state is saved
SPEED = "train/samples_per_second"


def tracked(root: Path, tracker: str | None = "tensorboard", config: FinetuneConfig = CONFIG) -> DynamicTrainer:
    monitoring = Monitoring(directory=root / "curves", tracker=tracker, labels={"data": "blobs"})
    return DynamicTrainer(dynamic(SIT), SIT, blobs(SIT), config, work_dir=root, monitoring=monitoring)


def stopped(root: Path, tracker: str | None = "tensorboard", step: int = 23) -> None:
    """Train up to a step."""
    run = tracked(root, tracker)
    stop(run, step)
    with pytest.raises(Stopped):
        run.train()


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


def remembering_tracker(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    """Register a tracker that outlives a kill: it adds step and first metric of each point to a file."""

    class Remembering(GeneralTracker):
        name = "aim"
        requires_logging_directory = False
        tracker = None

        def __init__(self, run_name: str, logging_dir: Path) -> None:
            super().__init__()

        def log(self, values: dict[str, float], step: int | None = None, **kwargs: Any) -> None:
            with file.open("a") as lines:
                lines.write(f"{step} {next(iter(values))}\n")

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "aim", Remembering)
