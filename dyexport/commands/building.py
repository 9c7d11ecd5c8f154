"""Running a build from a command: its stages shown on stderr, Ctrl-C in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dyexport.console import Interrupted, StageLines, chatter_on_stderr, stderr

if TYPE_CHECKING:
    from dyexport.pipeline.build import Pipeline
    from dyexport.pipeline.settings import BuildSettings


@contextmanager
def stage_lines() -> Iterator[StageLines]:
    try:
        with chatter_on_stderr(), StageLines() as lines:
            yield lines
    except KeyboardInterrupt as error:
        raise Interrupted("interrupted; the same command goes on after the last finished stage") from error


@contextmanager
def building(settings: BuildSettings, without: frozenset[str] = frozenset()) -> Iterator[Pipeline]:
    """The pipeline of a build; ``without`` names stages that may not run, only be found done."""
    with stage_lines() as lines:
        from dyexport.pipeline.build import opened
        from dyexport.pipeline.training_cost import check_training

        if not without and (note := check_training(settings)):
            stderr().print(note, soft_wrap=True)
        with opened(settings, lines, without=without) as pipeline:
            yield pipeline
