"""``dyexport.build``: the whole pipeline as one call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dyexport.bundle.reader import Bundle
from dyexport.errors import DyexportWarning, missing_extras
from dyexport.pipeline.build import build_bundle, opened
from dyexport.pipeline.output import replaced_notice
from dyexport.pipeline.settings import BuildSettings
from dyexport.pipeline.training_cost import check_training
from dyexport.stages.ledger import NullListener, Reporter

Progress = Callable[[str, int, int], None]
"""Function of the name of a stage, the number of units done and their total."""


@missing_extras()
def build(
    model: str | None = None,
    *,
    budget: float | Sequence[float] | None = None,
    checkpoint: str | Path | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Bundle:
    """Turn a checkpoint into a bundle of slim engines. A stopped build resumes after its last finished stage.

    ``model`` is the name of a preset, ``budget`` the FLOPs of attention and MLP relative to the static model, in
    (0, 1]. Several budgets are trained as one model, and the bundle runs at any of them, by default at the first. The
    bundle is written to ``out``, by default ``MODEL-BUDGET`` in the current directory; finished stages are
    kept in ``work``, by default ``out`` with ``.work`` added. ``progress(stage, done, total)`` is called as work
    proceeds. Other ``settings`` are those of ``BuildSettings``, with the defaults of the command line. A warning names
    what differs if a bundle of other settings is replaced.

    >>> bundle = dyexport.build("sit-digits", budget=0.5, random_weights=True, engines=2)
    >>> bundle
    Bundle('...sit-digits-0.5', sit-digits at 0.5 of the FLOPs, K = 2, onnx)
    >>> bundle.manifest.plan.flops_ratio < 0.51
    True

    Raises ``UsageError`` for settings that cannot be built, and other kinds of ``DyexportError`` if a stage fails.
    """
    values = {"model": model, "budget": budget, "out": out, **settings}
    if checkpoint is not None:
        values["checkpoint"] = str(checkpoint)
    chosen = BuildSettings.complete(**values)
    check_training(chosen)
    with opened(chosen, NullListener() if progress is None else Reporter(progress)) as run:
        build_bundle(run)
    if run.replaced:
        notice = replaced_notice(chosen.out, run.replaced)
        warnings.warn(notice, DyexportWarning, stacklevel=3)  # the caller of the decorated function
    return Bundle.open(chosen.out)
