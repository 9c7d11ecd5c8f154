"""Curves and pictures of a training run, kept on disk and sent to a tracker while it runs.

``metrics.jsonl`` has one line for each point. A resumed run keeps the points up to its saved state and goes on after
it, so no step is there twice or missing. Trackers are those of accelerate.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from pydantic import ValidationError

from dyexport.bundle.records import Frozen
from dyexport.errors import DyexportWarning, reason
from dyexport.files import flush, remove, replacing, storage_errors, write_atomically
from dyexport.training.trackers import TENSORBOARD, Tracker

if TYPE_CHECKING:
    from PIL.Image import Image

    from dyexport.training.evaluation import EvaluationSettings

METRICS, RECORD, PICTURES = "metrics.jsonl", "run.json", "pictures"
TRAIN, EVALUATION = "train", "evaluation"  # kinds of points, and prefixes of their metrics

Values = Mapping[str, float]
Point = dict[str, Any]
"""A line of the file of metrics: ``step``, the number of steps done, and metrics by name; None: not finite."""


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


class RunRecord(Frozen):
    """The contents of ``run.json``.

    ``sent`` has the last step that the tracker has, by kind of point. Unless it is ``behind``, it also has all points
    that were written to the file of metrics since.
    """

    run: str
    id: str
    tracker: str | None
    sent: dict[str, int]
    behind: bool = False
    hyperparameters: dict[str, bool | int | float | str]


class RunLog:
    """A log that keeps nothing: that of processes other than the main one."""

    evaluated = -1  # step of the latest evaluation that is kept

    def training(self, step: int, samples: int, values: Values) -> None:
        """Keep the metrics of the ``samples`` of the latest steps, of which ``step`` are done."""

    def evaluation(self, step: int, values: Values, picture: Image | None) -> None:
        """Keep the result of an evaluation after ``step`` steps."""
        self.evaluated = step

    def sync(self) -> None:
        """Flush all points to the disk. They must be there before a saved state that follows them."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time inside the context from the speed of training."""
        yield


class KeptLog(RunLog):
    """The log of the main process. ``step`` is the number of steps done, from which ``run`` goes on."""

    def __init__(self, monitoring: Monitoring, run: str, step: int, hyperparameters: Mapping[str, Any]) -> None:
        self.directory, self.metrics = monitoring.directory, monitoring.directory / METRICS
        old = _read_record(self.directory)
        if old is None or old.run != run:
            old = None
            with storage_errors(self.directory):
                remove(self.directory)
        points = _read_points(self.metrics)
        kept = [point for point in points if _step(point) <= step]
        self.evaluated = _last_steps(kept)[EVALUATION]
        follows = old is not None and old.tracker == monitoring.tracker
        self._sent = _sent(old, points) if old is not None and follows else _last_steps([])
        self._record = RunRecord(
            run=run,
            id=uuid4().hex[:8] if old is None else old.id,
            tracker=monitoring.tracker,
            sent=self._sent,
            hyperparameters={name: _plain(value) for name, value in {**monitoring.labels, **hyperparameters}.items()},
        )
        self._write_record(behind=True)  # before points are dropped that the tracker has
        write_atomically(self.metrics, "".join(map(_line, kept)).encode())
        self._tracker: Tracker | None = None
        if monitoring.tracker is not None:
            self._start(monitoring.tracker, kept)
        self._since = perf_counter()

    def _start(self, name: str, kept: list[Point]) -> None:
        """Start the tracker, and send it what it lacks of the points that are kept."""
        if name == TENSORBOARD:  # which drops the others when it starts
            self._sent = {kind: min(last, self._sent[kind]) for kind, last in _last_steps(kept).items()}
        record, purge_step = self._record, max(self._sent.values()) + 1
        self._tracker = Tracker(name, self.directory, record.id, purge_step, record.hyperparameters)
        for point in kept:
            self._send(point)
        if self._tracker is not None:
            self._write_record(behind=False)

    def training(self, step: int, samples: int, values: Values) -> None:
        now = perf_counter()
        speed = {"samples_per_second": samples / max(now - self._since, 1e-9)}
        self._since = now
        self._add(step, {f"{TRAIN}/{name}": value for name, value in {**values, **speed}.items()})

    def evaluation(self, step: int, values: Values, picture: Image | None) -> None:
        if picture is not None:
            with replacing(self._picture(step)) as partial:
                picture.save(partial, format="PNG")
        self._add(step, {f"{EVALUATION}/{name}": value for name, value in values.items()})
        super().evaluation(step, values, picture)

    def sync(self) -> None:
        with storage_errors(self.metrics):
            flush(self.metrics)

    @contextmanager
    def paused(self) -> Iterator[None]:
        begin = perf_counter()
        yield
        self._since += perf_counter() - begin

    def close(self) -> None:
        """Close the tracker."""
        self._track(Tracker.close)

    def _picture(self, step: int) -> Path:
        return self.directory / PICTURES / f"step-{step:08d}.png"

    def _add(self, step: int, values: Values) -> None:
        """Send a point to the tracker, and then to the file: a kill between them repeats it, and loses nothing."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        point: Point = {"step": step, **finite}
        self._send(point)
        with storage_errors(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(_line(point))

    def _send(self, point: Point) -> None:
        """Send a point to the tracker, unless it has it; an evaluation with its picture."""
        step, kind = _step(point), _kind(point)
        if step <= self._sent[kind]:
            return
        values = {name: value for name, value in point.items() if name != "step" and value is not None}

        def send(tracker: Tracker) -> None:
            if kind == EVALUATION and self._picture(step).exists():
                tracker.show(step, f"{EVALUATION}/{PICTURES}", self._picture(step))
            tracker.log(step, values)
            self._sent[kind] = step

        self._track(send)

    def _track(self, use: Callable[[Tracker], object]) -> None:
        """Use the tracker. One that fails is given up, with a warning: it must not end hours of training."""
        if self._tracker is None:
            return
        try:
            use(self._tracker)
        except Exception as error:  # each library raises its own
            self._tracker = None
            self._write_record(behind=True)
            warnings.warn(
                f"{self._record.tracker} failed ({reason(error)}) and gets no more points; training is not affected, "
                f"{self.metrics} has all curves, and if the run is resumed the tracker gets the missing ones",
                DyexportWarning,
                stacklevel=2,
            )

    def _write_record(self, *, behind: bool) -> None:
        record = self._record.model_copy(update={"sent": self._sent, "behind": behind})
        write_atomically(self.directory / RECORD, record.model_dump_json(indent=1).encode())


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


def _read_record(directory: Path) -> RunRecord | None:
    try:
        return RunRecord.model_validate_json((directory / RECORD).read_bytes())
    except (OSError, ValidationError):
        return None


def _read_points(path: Path) -> list[Point]:
    """Read the points of a file, without lines that a kill or a full disk has cut."""
    points: list[Point] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError):
            points.append(json.loads(line))
    return points


def _step(point: Point) -> int:
    return int(point["step"])


def _kind(point: Point) -> str:
    return EVALUATION if any(name.startswith(f"{EVALUATION}/") for name in point) else TRAIN


def _last_steps(points: list[Point]) -> dict[str, int]:
    """Return the last step of each kind of point; -1 where there is none."""
    return {kind: max((_step(p) for p in points if _kind(p) == kind), default=-1) for kind in (TRAIN, EVALUATION)}


def _sent(record: RunRecord, points: list[Point]) -> dict[str, int]:
    """Return the last steps that a tracker has, from the record and the file of metrics that a run left."""
    if record.behind:
        return record.sent
    return {kind: max(last, record.sent.get(kind, -1)) for kind, last in _last_steps(points).items()}


def _line(point: Point) -> str:
    return f"{json.dumps(point)}\n"


def _plain(value: Any) -> bool | int | float | str:
    """Return a hyperparameter as all trackers take it."""
    return value if isinstance(value, bool | int | float | str) else str(value)
