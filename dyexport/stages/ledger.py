"""The record of a work directory: which stages were made, and from which inputs.

A stage is made again if its inputs changed or its output is not the recorded one. It writes under a temporary name
next to its output, syncs, renames and is then recorded, so a kill at any moment loses at most the stage that it hits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from time import perf_counter
from typing import Any, Protocol

from pydantic import Field, ValidationError

from dyexport.bundle.manifest import FileRecord
from dyexport.bundle.records import Frozen
from dyexport.digests import remember
from dyexport.errors import UsageError
from dyexport.files import replacing, write_atomically
from dyexport.stages.file_records import damage, describe, digest_of

LEDGER = "ledger.json"
NOT_DONE = "not done yet"
KEY_LENGTH = 8  # of a digest of settings, in the name of what they made


class ProcessGroup(Protocol):
    """The processes of a run, ``count`` of them; ``index`` is this one's place.

    ``is_main_process`` is true in one of them, which alone writes to the work directory, but for the scratch of stages
    whose work is shared.
    """

    is_main_process: bool
    index: int
    count: int

    def broadcast(self, value: str) -> str:
        """Wait for all processes, and return the main process's value in each."""


class SingleProcess:
    """A run in one process."""

    is_main_process = True
    index, count = 0, 1

    def broadcast(self, value: str) -> str:
        return value


class BuildListener(Protocol):
    """Receiver of a build's progress."""

    def started(self, stage: str, why: str) -> None: ...

    def advanced(self, stage: str, done: int, total: int, detail: str = "") -> None: ...

    def finished(self, stage: str, seconds: float, *, reused: bool) -> None: ...


class NullListener:
    """A listener that ignores everything."""

    def started(self, stage: str, why: str) -> None: ...

    def advanced(self, stage: str, done: int, total: int, detail: str = "") -> None: ...

    def finished(self, stage: str, seconds: float, *, reused: bool) -> None: ...


class Reporter(NullListener):
    """A listener that calls a function with a stage, how much of it is done, and of how much."""

    def __init__(self, progress: Callable[[str, int, int], None]) -> None:
        self._progress = progress

    def advanced(self, stage: str, done: int, total: int, detail: str = "") -> None:
        self._progress(stage, done, total)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A step of a build that makes one file or directory, ``output``, relative to the work directory.

    ``inputs`` are the settings that matter and the digests of what is read. ``make`` writes the output to the path that
    it is called with. With the user's ``settings``, outputs of other settings are kept next to it, under names that end
    in a digest of their settings; without them only the latest is kept. All processes of a group make a ``shared``
    stage, and the output of the main process is kept.
    """

    name: str
    output: str
    inputs: Mapping[str, Any]
    make: Callable[[Path], None]
    settings: Mapping[str, Any] | None = None
    shared: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The output of a stage: ``path`` is a directory, or a file, which is '.' in ``files``.

    ``digest`` identifies its contents. ``seconds`` were spent in this run, ``made_in`` when it was made; the latter is
    None in ledgers written before durations were recorded.
    """

    path: Path
    files: Mapping[str, FileRecord]
    digest: str
    reused: bool
    seconds: float
    made_in: float | None


class Record(Frozen):
    """A finished stage: the digest of its inputs, its files, and the seconds that it took."""

    inputs: str
    files: dict[str, FileRecord]
    seconds: float | None = None
    settings: dict[str, Any] | None = None

    @property
    def digest(self) -> str:
        return digest_of({name: record.sha256 for name, record in self.files.items()})


@dataclass(frozen=True, kw_only=True)
class _Place:
    """The place of an output; ``key`` is its name in the ledger, ``kept`` a remark on other outputs that are kept."""

    key: str
    output: str
    kept: str = ""


class _Page(Frozen):
    stages: dict[str, Record] = Field(default_factory=dict)


class Ledger:
    """The stages of one work directory; those named in ``without`` are used but not made."""

    def __init__(
        self,
        work: Path,
        listener: BuildListener,
        *,
        without: frozenset[str] = frozenset(),
        group: ProcessGroup | None = None,
    ) -> None:
        self.work = work
        self.group = group or SingleProcess()
        self.outcomes: dict[str, Outcome] = {}
        self._listener = listener
        self._without = without
        self._lock = Lock()  # several stages may run at the same time

    def run(self, stage: Stage) -> Outcome:
        """Make the stage's output unless it is there, undamaged, and made from the same inputs."""
        inputs, begin = digest_of(stage.inputs), perf_counter()
        place = self._place(stage, inputs)
        why = self.group.broadcast(self._stale(place, inputs) if self.group.is_main_process else "")
        if why:
            self._listener.started(stage.name, why)
            if self.group.is_main_process:
                self._redo(stage, place, inputs, why)
            elif stage.shared:
                _help(stage)
            self.group.broadcast("done")
        record = _read_page(self.work).stages[place.key]
        outcome = Outcome(
            path=self.work / place.output,
            files=record.files,
            digest=record.digest,
            reused=not why,
            seconds=perf_counter() - begin,
            made_in=record.seconds,
        )
        self.note(stage.name, outcome)
        return outcome

    def check_allowed(self, name: str) -> None:
        """Raise ``UsageError`` for a stage that may not run and was never made, before its inputs are read."""
        if name in self._without and name not in self.records:
            raise _must_run_first(name, NOT_DONE)

    def _place(self, stage: Stage, inputs: str) -> _Place:
        """Find the place of a stage's output: next to outputs of other settings, never instead of them."""
        default = _Place(key=stage.name, output=stage.output)
        if stage.settings is None:
            return default
        records, prefix = self.records, f"{stage.name} "
        others = (key for key in records if key.startswith(prefix))
        for place in (default, *(_next_to(stage, key.removeprefix(prefix)) for key in others)):
            if place.key in records and records[place.key].inputs == inputs:  # a checkpoint that was moved is the same
                return place
        if default.key not in records or _normal(records[default.key].settings) == _normal(stage.settings):
            return default
        kept = _contrast(stage.settings, records[default.key].settings or {})
        return _next_to(stage, settings_key(stage.settings), kept)

    @property
    def records(self) -> dict[str, Record]:
        """Every stage that was ever made here, as it was made last."""
        return _read_page(self.work).stages

    def seconds_of(self, target: str) -> dict[str, float]:
        """Return the seconds that plans of a target took, by network."""
        prefix = f"{target} "
        timed = {name: record.seconds for name, record in self.records.items() if name.startswith(prefix)}
        return {name.removeprefix(prefix): seconds for name, seconds in timed.items() if seconds is not None}

    def note(self, name: str, outcome: Outcome) -> None:
        """Keep the outcome of a stage, and report it."""
        self.outcomes[name] = outcome
        self._listener.finished(name, outcome.seconds, reused=outcome.reused)

    def _stale(self, place: _Place, inputs: str) -> str:
        """Return why a stage must run; '' if it need not."""
        record = _read_page(self.work).stages.get(place.key)
        if record is None:
            return f"{NOT_DONE}{place.kept}"
        if record.inputs != inputs:
            return "its inputs changed"
        return next(damage(self.work / place.output, record.files), "")

    def _redo(self, stage: Stage, place: _Place, inputs: str, why: str) -> None:
        if stage.name in self._without:
            raise _must_run_first(stage.name, why)
        output, begin = self.work / place.output, perf_counter()
        with replacing(output, follow_symlinks=False) as partial:
            stage.make(partial)
            seconds = round(perf_counter() - begin, 3)
            settings = _normal(stage.settings)
            record = Record(inputs=inputs, files=describe(partial), seconds=seconds, settings=settings)
        if output.is_file():
            remember(output, record.files["."].sha256)  # renamed, so no longer the file that was read
        self._record(place.key, record)

    def _record(self, key: str, record: Record) -> None:
        with self._lock:
            page = _Page(stages={**_read_page(self.work).stages, key: record})
            write_atomically(self.work / LEDGER, page.model_dump_json(indent=1).encode())


def _read_page(work: Path) -> _Page:
    """Read the ledger; one that cannot be read is empty, and outputs are made again."""
    try:
        return _Page.model_validate_json((work / LEDGER).read_bytes())
    except (OSError, ValidationError):
        return _Page()


def _next_to(stage: Stage, settings: str, kept: str = "") -> _Place:
    return _Place(key=f"{stage.name} {settings}", output=f"{stage.output}-{settings}", kept=kept)


def settings_key(settings: Mapping[str, Any]) -> str:
    """Return a short digest that distinguishes outputs of different settings."""
    return digest_of(settings)[:KEY_LENGTH]


def _normal(settings: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return settings as they are read back from a ledger."""
    return None if settings is None else json.loads(json.dumps(settings))


def _contrast(settings: Mapping[str, Any], others: Mapping[str, Any]) -> str:
    """Name the first setting that differs, as a reason why the stage must run and what is kept."""
    now, before = _normal(settings) or {}, _normal(others) or {}
    differing = [name for name in now if now[name] != before.get(name)]
    if not differing or differing[0] not in before:
        return " with these settings; what other settings made is kept"
    name = differing[0]
    return f" with {name} {now[name]}; what {name} {before[name]} made is kept"


def _must_run_first(name: str, why: str) -> UsageError:
    return UsageError(f"stage {name!r} must run first ({why}); use `dyexport build` with these settings")


def _help(stage: Stage) -> None:
    """Take part in making a shared stage; the output of this process is not kept."""
    with TemporaryDirectory() as directory:
        stage.make(Path(directory) / Path(stage.output).name)
