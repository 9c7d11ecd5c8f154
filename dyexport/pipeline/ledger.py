"""What has been built, from what. A stage is redone when its inputs changed or its output is not what it was.

A stage writes under a temporary name beside its output, syncs, renames and is then recorded, so a
kill at any moment loses at most the stage it hit.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from time import perf_counter
from typing import Any, Protocol

from pydantic import Field, ValidationError

from dyexport.bundle.manifest import FileRecord, Frozen
from dyexport.digests import note, recall, remember, sha256_of
from dyexport.errors import UsageError
from dyexport.files import replacing, storage_errors, write_atomically
from dyexport.pipeline.output import held
from dyexport.pipeline.settings import SETTINGS
from dyexport.training.processes import ProcessGroup, SingleProcess

LEDGER = "ledger.json"
NOT_DONE = "not done yet"
KEY_LENGTH = 8  # of a digest of settings, in the name of what they made
LOCK = ".dyexport.lock"  # also what a work directory is known by


class BuildListener(Protocol):
    """Is told what a build is doing."""

    def started(self, stage: str, why: str) -> None: ...

    def advanced(self, stage: str, done: int, total: int, detail: str = "") -> None: ...

    def finished(self, stage: str, seconds: float, *, reused: bool) -> None: ...


class NullListener:
    """A listener that says nothing."""

    def started(self, stage: str, why: str) -> None: ...

    def advanced(self, stage: str, done: int, total: int, detail: str = "") -> None: ...

    def finished(self, stage: str, seconds: float, *, reused: bool) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Stage:
    """``inputs`` are the settings that matter and the digests of what is read; ``make`` writes ``output`` where told.

    ``output`` is a file or a directory, relative to the work directory. With ``settings``, what the user chose,
    outputs of other settings are kept next to it, under names that end in a digest of theirs; without them only the
    latest is kept. Where processes work as a team, all of them make a ``shared`` stage, and the leader's output counts.
    """

    name: str
    output: str
    inputs: Mapping[str, Any]
    make: Callable[[Path], None]
    settings: Mapping[str, Any] | None = None
    shared: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """``digest`` identifies the contents of ``path``, a file ('.' in ``files``) or a directory.

    ``seconds`` were spent now, ``made_in`` when it was made; None where a ledger of before does not tell.
    """

    path: Path
    files: Mapping[str, FileRecord]
    digest: str
    reused: bool
    seconds: float
    made_in: float | None


class Record(Frozen):
    """What a stage was made from, what it made, and how long that took."""

    inputs: str
    files: dict[str, FileRecord]
    seconds: float | None = None
    settings: dict[str, Any] | None = None

    @property
    def digest(self) -> str:
        return digest_of({name: record.sha256 for name, record in self.files.items()})


@dataclass(frozen=True, kw_only=True)
class _Place:
    """``key`` is the name in the ledger; ``kept`` says what other settings made, where that is there too."""

    key: str
    output: str
    kept: str = ""


class _Page(Frozen):
    stages: dict[str, Record] = Field(default_factory=dict)


class Ledger:
    """The stages of one work directory; those named in ``without`` may be used but not redone."""

    def __init__(
        self,
        work: Path,
        listener: BuildListener,
        *,
        without: frozenset[str] = frozenset(),
        team: ProcessGroup | None = None,
    ) -> None:
        self.work = work
        self.team = team or SingleProcess()
        self.outcomes: dict[str, Outcome] = {}
        self._listener = listener
        self._without = without
        self._lock = Lock()  # stages may run side by side

    def run(self, stage: Stage) -> Outcome:
        """Make the stage's output unless it is there, whole, and made from the same inputs."""
        inputs, begin = digest_of(stage.inputs), perf_counter()
        place = self._place(stage, inputs)
        why = self.team.agree(self._stale(place, inputs) if self.team.leads else "")
        if why:
            self._listener.started(stage.name, why)
            if self.team.leads:
                self._redo(stage, place, inputs, why)
            elif stage.shared:
                _help(stage)
            self.team.agree("done")
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
        """Raise ``UsageError`` at once for a stage that may not run and was never done, before its inputs are read."""
        if name in self._without and name not in self.records:
            raise _must_run_first(name, NOT_DONE)

    def _place(self, stage: Stage, inputs: str) -> _Place:
        """Find the place of a stage's output: next to what other settings made, never instead of it."""
        usual = _Place(key=stage.name, output=stage.output)
        if stage.settings is None:
            return usual
        records, prefix = self.records, f"{stage.name} "
        others = (key for key in records if key.startswith(prefix))
        for place in (usual, *(_beside(stage, key.removeprefix(prefix)) for key in others)):
            if place.key in records and records[place.key].inputs == inputs:  # a checkpoint that was moved is the same
                return place
        if usual.key not in records or _normal(records[usual.key].settings) == _normal(stage.settings):
            return usual
        kept = _contrast(stage.settings, records[usual.key].settings or {})
        return _beside(stage, settings_key(stage.settings), kept)

    @property
    def records(self) -> dict[str, Record]:
        """Every stage that was ever done here, as it was done last."""
        return _read_page(self.work).stages

    def note(self, name: str, outcome: Outcome) -> None:
        """Keep what came of a stage, and tell the listener."""
        self.outcomes[name] = outcome
        self._listener.finished(name, outcome.seconds, reused=outcome.reused)

    def _stale(self, place: _Place, inputs: str) -> str:
        """Why a stage must run; empty when it need not."""
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
    """A ledger that cannot be read says nothing is done; outputs are then made again."""
    try:
        return _Page.model_validate_json((work / LEDGER).read_bytes())
    except (OSError, ValidationError):
        return _Page()


def _beside(stage: Stage, settings: str, kept: str = "") -> _Place:
    return _Place(key=f"{stage.name} {settings}", output=f"{stage.output}-{settings}", kept=kept)


def settings_key(settings: Mapping[str, Any]) -> str:
    """Tells what was made with these settings from what others made."""
    return digest_of(settings)[:KEY_LENGTH]


def _normal(settings: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """As they are read back from a ledger."""
    return None if settings is None else json.loads(json.dumps(settings))


def _contrast(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Name the first setting that differs, as a reason why the stage must run and what is kept."""
    mine, before = _normal(ours) or {}, _normal(theirs) or {}
    differing = [name for name in mine if mine[name] != before.get(name)]
    if not differing or differing[0] not in before:
        return " with these settings; what others made is kept"
    name = differing[0]
    return f" with {name} {mine[name]}; what {name} {before[name]} made is kept"


def _must_run_first(name: str, why: str) -> UsageError:
    return UsageError(f"stage {name!r} must run first ({why}); use `dyexport build` with these settings")


def _help(stage: Stage) -> None:
    """Take part in making a shared stage, and leave its output to the leader."""
    with TemporaryDirectory() as directory:
        stage.make(Path(directory) / Path(stage.output).name)


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """Hold the work directory; raises ``StorageError`` while another process does.

    Stages replace what has the names of their outputs, so a directory of anything else is refused with ``UsageError``.
    Where nothing was done, no directory is left behind.
    """
    with storage_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        if any(work.iterdir()) and not (work / LOCK).is_file() and not _read_page(work).stages:
            raise UsageError(f"--work {work} is not empty and not of a build; give another one")
    with held(work / LOCK, f"another build is using {work}; wait for it, or give another --work"):
        try:
            yield
        finally:
            if {path.name for path in work.iterdir()} <= {LOCK, SETTINGS}:
                shutil.rmtree(work)


def digest_of_spans(path: Path, spans: Sequence[tuple[int, int]]) -> str:
    """Identifies parts of a file, (offset, length) each; read once, as the file itself is."""
    fact = f"spans {sha256_of(path)} {digest_of(list(spans))}"
    if (known := recall(fact)) is not None:
        return known
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for offset, length in spans:
            file.seek(offset)
            while length:
                piece = file.read(min(length, 1 << 24))
                digest.update(piece)
                length -= len(piece)
    note(fact, digest.hexdigest())
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """Identifies a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def describe(path: Path) -> dict[str, FileRecord]:
    """Every file below ``path``, or ``path`` itself under the name '.'."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return {
        str(file.relative_to(path)): FileRecord(sha256=sha256_of(file), bytes=file.stat().st_size) for file in files
    }


def damage(path: Path, files: Mapping[str, FileRecord]) -> Iterator[str]:
    """What differs between ``path`` and what was recorded of it."""
    for name, record in files.items():
        file = path / name
        if not file.is_file():
            yield f"{file} is missing"
        elif file.stat().st_size != record.bytes or sha256_of(file) != record.sha256:
            yield f"{file} is damaged"
    found = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    yield from (f"{path / name} is not of this build" for name in sorted(found - files.keys()))
