"""What the build commands share: settings from options, stages shown on stderr, Ctrl-C in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from dyexport.commands.given import Given
from dyexport.commands.options import BuildOptions
from dyexport.console import Interrupted, StageLines, chatter_on_stderr, stderr

if TYPE_CHECKING:
    from dyexport.pipeline.build import Pipeline
    from dyexport.pipeline.settings import BuildSettings

OF_PLANS = ("engines", "compute_capability", "profile", "stream_weights")
OF_ENGINES = (*OF_PLANS, "target", "token_path", "merge_tolerance", "quantize", "no_baseline")
OF_CALIBRATION = ("precision", "memory")


def checked_settings(options: BuildOptions, context: typer.Context, *unused: str, last: str = "") -> BuildSettings:
    """Checked; refuses the options that only stages after the ``last`` one of this command read."""
    given = Given(context)
    given.refuse(True, f"this command ends with {last}", *unused)
    given.refuse(bool(last) and options.work is not None, "no bundle is written, and --work holds the rest", "out")
    settings = options.settings()
    taken = f"{settings.checkpoint} has routers already and is taken as it is"
    given.refuse(settings.routers == "given", taken, "router", "td_lora", "finetune_steps")
    given.refuse(settings.routers == "none", "with --finetune-steps 0 every token runs", "token_path")
    return settings


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
        from dyexport.pipeline.stages import check_training

        if not without and (note := check_training(settings)):
            stderr().print(note, soft_wrap=True)
        with opened(settings, lines, without=without) as pipeline:
            yield pipeline
