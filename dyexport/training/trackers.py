"""Names of accelerate's trackers, and the check that one is installed. Imports no torch."""

from __future__ import annotations

from difflib import get_close_matches
from importlib.util import find_spec

from dyexport.errors import MissingDependencyError, UsageError

TENSORBOARD = "tensorboard"
TRACKERS = (TENSORBOARD, "trackio", "wandb", "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab")
"""Trackers by accelerate's names, which are those of the modules."""
NONE = "none"  # no tracker, where a work directory records one
_OTHERS = {TENSORBOARD: ("tensorboardX",)}  # modules that do as well


def check_tracker(name: str) -> None:
    """Raise ``UsageError`` for a name that is unknown."""
    if name not in TRACKERS:
        close = get_close_matches(name.lower(), TRACKERS, n=1)
        cure = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(TRACKERS)}"
        raise UsageError(f"--tracker is {name!r}; {cure}")


def check_installed(name: str) -> None:
    """Raise ``MissingDependencyError`` for a tracker that is not installed."""
    if not any(find_spec(module) for module in (name, *_OTHERS.get(name, ()))):
        raise MissingDependencyError(name, "tracking" if name == TENSORBOARD else None)
