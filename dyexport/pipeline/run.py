"""One run of the pipeline: its settings, the ledger of its work directory, and whom it reports to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import copy
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from dyexport.digests import sha256_of
from dyexport.files import remove
from dyexport.pipeline.settings import BuildSettings
from dyexport.progress import Progress
from dyexport.stages.ledger import BuildListener, Ledger, Outcome, ProcessGroup, SingleProcess, Stage, settings_key

LINK_STORE_FROM = 2**30  # bytes; a weight store of at least this size is linked into the bundle, a smaller one copied


class Run:
    """A run that takes stages from the work directory, or makes them. Stages named in ``without`` are not made."""

    def __init__(
        self,
        settings: BuildSettings,
        listener: BuildListener,
        *,
        without: frozenset[str] = frozenset(),
        group: ProcessGroup | None = None,
    ) -> None:
        self.settings = settings
        self.listener = listener
        self.label = ""  # of the stages of one budget among several
        self.whole = self  # the run of all budgets
        self.replaced: Mapping[str, Any] = {}  # settings of the bundle that this run replaced, where they differ
        self.link_store_from = LINK_STORE_FROM
        self.ledger = Ledger(settings.work, listener, without=without, group=group)

    def at(self, budget: float) -> Run:
        """Return the run of one of several budgets: its stages have names and outputs of that budget.

        ``whole`` stays the run of all budgets, which makes what they share.
        """
        run = copy(self)
        run.settings, run.label = self.settings.at(budget), f"{budget:g}"
        return run

    def by_budget(self) -> list[Run]:
        """Return the run of each budget, the default one first; of a single budget this run."""
        others = [budget for budget in self.settings.budgets if budget != self.settings.budget]
        return [self] if not others else [self.at(budget) for budget in (self.settings.budget, *others) if budget]

    def named(self, stage: str) -> str:
        """Return the full name of a stage."""
        return f"{stage}@{self.label}" if self.label else stage

    def file(self, output: str) -> str:
        """Return the output of a stage, relative to the work directory."""
        path = PurePosixPath(output)
        return str(path.with_name(f"{self.label}-{path.name}")) if self.label else output

    def stage(
        self,
        name: str,
        output: str,
        inputs: Mapping[str, Any],
        make: Callable[[Path], None],
        *,
        chosen: Mapping[str, Any] | None = None,
        scratch: Path | None = None,
        shared: bool = False,
    ) -> Outcome:
        """Make ``output`` in the work directory unless it is there, made from the same inputs.

        Outputs of other ``chosen`` settings are kept next to it. ``scratch`` is what a stopped run resumes from; it is
        removed afterwards. All processes of a group make a ``shared`` stage.
        """
        name, output = self.named(name), self.file(output)
        stage = Stage(name=name, output=output, inputs=inputs, make=make, settings=chosen, shared=shared)
        outcome = self.ledger.run(stage)
        if scratch is not None and self.ledger.group.is_main_process:
            remove(scratch)
            with suppress(OSError):  # another run's scratch is in the folder
                scratch.parent.rmdir()
        return outcome

    def scratch(self, stage: str, chosen: Mapping[str, Any]) -> Path:
        """Return the folder in which a stage keeps what it needs to resume."""
        return self.settings.work / "training" / f"{stage}-{settings_key(chosen)}"

    def progress(self, stage: str, phase: str = "") -> Progress:
        """Return the function to which a stage, or one phase of it, reports its progress."""
        return partial(self.listener.advanced, self.named(stage), detail=phase)

    def training_progress(self, stage: str) -> Callable[[int, int, Mapping[str, float]], None]:
        """Return the function to which a stage that trains reports its progress and metrics."""

        def progress(done: int, total: int, metrics: Mapping[str, float]) -> None:
            detail = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            self.listener.advanced(stage, done, total, detail)

        return progress

    def leave_group(self) -> None:
        """Leave the process group: all stages after training run in one process."""
        self.ledger.group = SingleProcess()

    def remember_digests(self) -> None:
        """Note every file's digest, now that all are older than the clock's resolution: the next build reads none."""
        for outcome in self.ledger.outcomes.values():
            for name in outcome.files:
                sha256_of(outcome.path / name)

    @property
    def stage_report(self) -> dict[str, dict[str, Any]]:
        """Every stage so far: made or reused, seconds it took now, and seconds when it was made."""
        return {
            name: {
                "status": "reused" if outcome.reused else "done",
                "seconds": round(outcome.seconds, 3),
                "made_in": outcome.made_in,
            }
            for name, outcome in self.ledger.outcomes.items()
        }
