"""Trackers of accelerate: their names, the check that one is installed, and one that is in use. Imports no torch."""

from __future__ import annotations

from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyexport.errors import DyexportError, MissingDependencyError, UsageError, reason

if TYPE_CHECKING:
    from collections.abc import Mapping

TENSORBOARD = "tensorboard"
TRACKERS = (TENSORBOARD, "trackio", "wandb", "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab")
"""Trackers by accelerate's names, which are those of the modules."""
NONE = "none"  # no tracker, where a work directory records one
PROJECT = "dyexport"  # of trackers that have projects
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


class Tracker:
    """One of accelerate's trackers, started for a ``run`` that is kept in ``folder``.

    It has the steps of the run before ``purge_step``. TensorBoard drops later ones, and others keep them. Methods raise
    whatever the library raises. Raises ``DyexportError`` if it does not start.
    """

    def __init__(self, name: str, folder: Path, run: str, purge_step: int, hyperparameters: Mapping[str, Any]) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        self.name = name
        try:
            self._tracker = LOGGER_TYPE_TO_CLASS[name](**tracker_arguments(name, folder, run, purge_step))
            self._tracker.start()
            if name != TENSORBOARD or purge_step == 0:  # which keeps those of a run that goes on
                self._tracker.store_init_configuration(dict(hyperparameters))
        except Exception as error:  # each library raises its own
            raise DyexportError(
                f"--tracker {name} does not start ({reason(error)}); set it up, or train with --tracker none"
            ) from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._tracker.log(dict(values), step=step)

    def show(self, step: int, name: str, file: Path) -> None:
        """Show a picture, where the tracker takes any."""
        import numpy as np
        from PIL import Image

        if self.name not in (TENSORBOARD, "wandb", "swanlab"):
            return
        with Image.open(file) as picture:
            if self.name == TENSORBOARD:
                images = np.asarray(picture)[None]  # (1, H, W, 3)
                self._tracker.log_images({name: images}, step=step, dataformats="NHWC")
            else:
                self._tracker.log_images({name: [picture]}, step=step)

    def close(self) -> None:
        self._tracker.finish()


def tracker_arguments(name: str, folder: Path, run: str, purge_step: int) -> dict[str, Any]:
    """Return the arguments of accelerate's class of a tracker, for a ``run`` that is kept in ``folder``."""
    label = f"{folder.name}-{run}"
    arguments: dict[str, dict[str, Any]] = {
        TENSORBOARD: {"run_name": folder.name, "logging_dir": folder.parent, "purge_step": purge_step},
        "wandb": {"name": label, "id": label, "resume": "allow", "dir": str(folder)},
        "trackio": {"name": label, "resume": "allow"},
        "aim": {"logging_dir": folder},
        "dvclive": {"dir": str(folder / "dvclive"), "dvcyaml": str(folder / "dvc.yaml"), "resume": purge_step > 0},
        "mlflow": {"run_name": label},
        "swanlab": {"experiment_name": label, "logdir": str(folder / "swanlab")},
    }
    project = "experiment_name" if name == "mlflow" else "run_name"  # as accelerate calls it
    return {project: PROJECT, **arguments.get(name, {})}
