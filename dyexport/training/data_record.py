"""The record in a directory of latents that were encoded from pictures. Imports no torch."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from dyexport.bundle.records import Frozen, first_problem
from dyexport.errors import DataError, DyexportWarning
from dyexport.files import write_atomically

RECORD = "encoding.json"
VERSION = 1
SCALES = (0.5, 2.0)
"""Standard deviations of latents that training takes.

A VAE's ``scaling_factor`` makes it about 1 (arXiv 2112.10752 appendix G), for which noise schedules are made. Latents
that were not scaled have the inverse of the factor: 5.5 for 0.18215, 2.8 for 0.3611. Scaled twice, they have the
factor.
"""


class DataRecord(Frozen):
    """Record of what latents were encoded from.

    ``options`` decide what all shards hold, ``scaling`` what latents were shifted and scaled by. ``classes`` are names
    by label; None for captions, and for labels that are numbers. ``grids`` are rows and columns of tokens by shard, of
    those that are not of the model's own size. ``samples``, ``mean`` and ``std`` are those of the latents, None until
    ``complete``.
    """

    version: int = VERSION
    complete: bool = False
    options: dict[str, Any]
    scaling: dict[str, Any]
    classes: tuple[str, ...] | None = None
    grids: dict[str, tuple[int, int]] = Field(default_factory=dict)
    samples: int | None = None
    mean: float | None = None
    std: float | None = None

    def save(self, directory: Path) -> None:
        """Write the record to a directory of latents."""
        write_atomically(directory / RECORD, f"{self.model_dump_json(indent=1)}\n".encode())


def read_record(directory: Path) -> DataRecord | None:
    """Read the record of a directory; None if it has none. Raises ``DataError`` for one that cannot be read."""
    file = directory / RECORD
    try:
        return DataRecord.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        why = first_problem(error) if isinstance(error, ValidationError) else error.strerror
        raise DataError(f"cannot read {file} ({why}); delete {directory}, and encode the pictures again") from error


def check_record(directory: Path, classes: int, model: str) -> DataRecord | None:
    """Read the record of a directory, and check it against the number of classes of a model, 0 for prompts.

    Raises ``DataError`` for encoding that was interrupted, and for another number of classes.
    """
    record = read_record(directory)
    if record is None:
        return None
    if not record.complete:
        raise DataError(f"{directory} holds a part of its latents; repeat the `dyexport encode` that was interrupted")
    if record.classes is not None and classes:
        check_classes(record.classes, classes, str(directory), model)
    return record


def check_classes(names: tuple[str, ...], classes: int, source: str, model: str) -> None:
    """Raise ``DataError`` unless there are as many names as classes of a model."""
    if len(names) != classes:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise DataError(
            f"{source} has {len(names)} classes ({shown}) and {model} {classes}; encode with a folder for each class, "
            "or with --classes, a file that names all of them"
        )


def warn_of_scale(record: DataRecord, directory: Path) -> None:
    """Warn if a VAE made latents of another scale than models are trained at."""
    if record.scaling and record.std is not None and not SCALES[0] <= record.std <= SCALES[1]:
        warnings.warn(
            f"the latents in {directory} have a standard deviation of {record.std:.3g}, and models are trained at "
            "about 1; check that the VAE is the model's and that its config.json has its scaling_factor",
            DyexportWarning,
            stacklevel=3,
        )
