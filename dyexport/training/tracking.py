"""Curves and pictures of a training run, kept on disk and sent to a tracker while it runs.

``metrics.jsonl`` has one line for each point. A resumed run keeps the points up to its saved state and goes on after
it, so no step is there twice or missing. Trackers are those of accelerate.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import IO, TYPE_CHECKING, Any
from uuid import uuid4

from dyexport.errors import DyexportError, DyexportWarning, reason
from dyexport.files import remove, replacing, storage_errors, write_atomically
from dyexport.training.trackers import TENSORBOARD

if TYPE_CHECKING:
    from PIL.Image import Image

    from dyexport.training.evaluation import EvaluationSettings

METRICS, RECORD, PICTURES = "metrics.jsonl", "run.json", "pictures"
PROJECT = "dyexport"  # of trackers that have projects
TRAIN, EVALUATION = "train", "evaluation"  # prefixes of metrics

Values = Mapping[str, float]
Point = dict[str, float]
"""A line of the file of metrics: ``step``, the number of steps done, and metrics by name."""


@dataclass(frozen=True, kw_only=True)
class Monitoring:
    """Settings of the curves, pictures and evaluations of a run.

    directory   place of its metrics, its pictures and the files of some trackers
    tracker     accelerate's name of a tracker that gets the metrics too
    labels      hyperparameters that the trainer does not know
    evaluation  how the averaged weights are evaluated; None: they are not
    """

    directory: Path
    tracker: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    evaluation: EvaluationSettings | None = None


class RunLog:
    """A log that keeps nothing: that of processes other than the main one."""

    evaluated = -1  # step of the latest evaluation that is kept

    def training(self, step: int, samples: int, values: Values) -> None:
        """Keep the metrics of the ``samples`` of the latest steps, of which ``step`` are done."""

    def evaluation(self, step: int, values: Values, picture: Image | None) -> None:
        """Keep the result of an evaluation after ``step`` steps."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time inside the context from the speed of training."""
        yield


class KeptLog(RunLog):
    """The log of the main process. ``step`` is the number of steps done, from which ``run`` goes on."""

    def __init__(self, monitoring: Monitoring, run: str, step: int, hyperparameters: Mapping[str, Any]) -> None:
        self.directory = monitoring.directory
        record = _read_record(self.directory)
        if record.get("run") != run:
            record = {}
            with storage_errors(self.directory):
                remove(self.directory)
        points = _read_points(self.directory / METRICS)
        kept = [point for point in points if point["step"] <= step]
        self.evaluated = _last_steps(kept)[EVALUATION]
        follows = monitoring.tracker is not None and record.get("tracker") == monitoring.tracker
        values = {name: _plain(value) for name, value in {**monitoring.labels, **hyperparameters}.items()}
        before = record.get("sent", {}) if follows else {}
        sent = {kind: max(step, before.get(kind, -1)) if follows else -1 for kind, step in _last_steps(points).items()}
        record = {"run": run, "id": record.get("id", uuid4().hex[:8]), "tracker": monitoring.tracker, "sent": sent}
        self._tracker = None
        if monitoring.tracker is not None:
            self._tracker = _Tracker(monitoring.tracker, self.directory, record["id"])
            if follows:
                self._tracker.resume(step, sent)
            else:
                self._tracker.start(values, kept)
        self._file = self._open(kept)
        write_atomically(self.directory / RECORD, json.dumps({**record, "hyperparameters": values}, indent=1).encode())
        self._since = perf_counter()

    def _open(self, kept: list[Point]) -> IO[str]:
        """Write the points that are kept, and open the file to add others."""
        path = self.directory / METRICS
        write_atomically(path, "".join(map(_line, kept)).encode())
        with storage_errors(path):
            return path.open("a", encoding="utf-8")

    def training(self, step: int, samples: int, values: Values) -> None:
        now = perf_counter()
        speed = {"samples_per_second": samples / max(now - self._since, 1e-9)}
        self._since = now
        self._add(step, {f"{TRAIN}/{name}": value for name, value in {**values, **speed}.items()})

    def evaluation(self, step: int, values: Values, picture: Image | None) -> None:
        if picture is not None:
            with replacing(self.directory / PICTURES / f"step-{step:08d}.png") as partial:
                picture.save(partial, format="PNG")
            if self._tracker is not None:
                self._tracker.show(f"{EVALUATION}/{PICTURES}", picture, step)
        self._add(step, {f"{EVALUATION}/{name}": value for name, value in values.items()})
        self.evaluated = step

    @contextmanager
    def paused(self) -> Iterator[None]:
        begin = perf_counter()
        yield
        self._since += perf_counter() - begin

    def _add(self, step: int, values: Values) -> None:
        """Send a point to the tracker, and then to the file: a kill between them repeats it, and loses nothing."""
        point = {"step": step, **{name: value for name, value in values.items() if math.isfinite(value)}}
        if self._tracker is not None:
            self._tracker.log(point)
        with storage_errors(self.directory / METRICS):
            self._file.write(_line(point))
            self._file.flush()

    def close(self) -> None:
        """Close the file and the tracker."""
        self._file.close()
        if self._tracker is not None:
            self._tracker.close()


@contextmanager
def opened_log(
    monitoring: Monitoring | None, run: str, step: int, hyperparameters: Mapping[str, Any]
) -> Iterator[RunLog]:
    """Yield the log of a run from ``step`` on, which is closed at the end, on an error, and on Ctrl-C."""
    if monitoring is None:
        yield RunLog()
        return
    log = KeptLog(monitoring, run, step, hyperparameters)
    try:
        yield log
    finally:
        log.close()


class _Tracker:
    """One of accelerate's trackers. One that fails while training goes on is given up, with a warning."""

    def __init__(self, name: str, directory: Path, run: str) -> None:
        self._name = name
        self._directory = directory
        self._run = run
        self._sent: Mapping[str, int] = {}  # steps that are there already, up to this one, by kind of point
        self._tracker: Any = None

    def start(self, hyperparameters: Mapping[str, Any], points: list[Point]) -> None:
        """Start a run, with the points of a time when it was not tracked."""
        self._open(purge_step=0)
        self._tracker.store_init_configuration(dict(hyperparameters))
        for point in points:
            self.log(point)

    def resume(self, step: int, sent: Mapping[str, int]) -> None:
        """Resume a run after ``step``. ``sent`` are the last steps that it has, by kind of point.

        TensorBoard drops what is later. Others keep it, and the same steps, which give the same points, are left out.
        """
        self._open(purge_step=step + 1)
        self._sent = {} if self._name == TENSORBOARD else sent

    def _open(self, purge_step: int) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        with storage_errors(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
        try:
            self._tracker = LOGGER_TYPE_TO_CLASS[self._name](
                **tracker_arguments(self._name, self._directory, self._run, purge_step)
            )
            self._tracker.start()
        except Exception as error:  # each library raises its own
            why = f"{self._name} does not start ({reason(error)})"
            raise DyexportError(f"--tracker {why}; set it up, or leave --tracker out") from error

    def log(self, point: Point) -> None:
        step = int(point["step"])
        if step > self._sent.get(_kind(point), -1):
            self._call(lambda tracker: tracker.log({k: v for k, v in point.items() if k != "step"}, step=step))

    def show(self, name: str, picture: Image, step: int) -> None:
        """Show a picture, where the tracker takes any."""
        if step <= self._sent.get(EVALUATION, -1):
            return
        import numpy as np

        if self._name == TENSORBOARD:
            images = np.asarray(picture)[None]  # (1, H, W, 3)
            self._call(lambda tracker: tracker.log_images({name: images}, step=step, dataformats="NHWC"))
        elif self._name in ("wandb", "swanlab"):
            self._call(lambda tracker: tracker.log_images({name: [picture]}, step=step))

    def close(self) -> None:
        self._call(lambda tracker: tracker.finish())

    def _call(self, use: Callable[[Any], object]) -> None:
        if self._tracker is None:
            return
        try:
            use(self._tracker)
        except Exception as error:  # a service that is down must not end hours of training
            self._tracker = None
            kept = f"training goes on, and {self._directory / METRICS} has all curves"
            warnings.warn(f"{self._name} failed ({reason(error)}); {kept}", DyexportWarning, stacklevel=2)


def tracker_arguments(name: str, folder: Path, run: str, purge_step: int) -> dict[str, Any]:
    """Return the arguments of accelerate's class of a tracker, for a ``run`` that is kept in ``folder``."""
    label = f"{folder.name}-{run}"
    arguments: dict[str, dict[str, Any]] = {
        TENSORBOARD: {"run_name": folder.name, "logging_dir": folder.parent, "purge_step": purge_step},
        "wandb": {"name": label, "id": label, "resume": "allow", "dir": str(folder)},
        "trackio": {"name": label, "resume": "allow"},
        "aim": {"logging_dir": folder},
        "mlflow": {"logging_dir": folder},
    }
    project = "experiment_name" if name == "mlflow" else "run_name"  # as accelerate calls it
    return {project: PROJECT, **arguments.get(name, {})}


def _read_record(directory: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((directory / RECORD).read_bytes())
    except (OSError, ValueError):
        return {}
    return record


def _read_points(path: Path) -> list[Point]:
    """Read the points of a file, whose last line a kill may have cut."""
    points: list[Point] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            points.append(json.loads(line))
        except ValueError:
            break
    return points


def _kind(point: Point) -> str:
    return EVALUATION if any(name.startswith(f"{EVALUATION}/") for name in point) else TRAIN


def _last_steps(points: list[Point]) -> dict[str, int]:
    """Return the last step of each kind of point; -1 where there is none."""
    return {kind: max((int(p["step"]) for p in points if _kind(p) == kind), default=-1) for kind in (TRAIN, EVALUATION)}


def _line(point: Point) -> str:
    return f"{json.dumps(point)}\n"


def _plain(value: Any) -> bool | int | float | str:
    """Return a hyperparameter as all trackers take it."""
    return value if isinstance(value, bool | int | float | str) else str(value)
