"""Errors that dyexport raises on purpose.

    DyexportError
    ├── UsageError          a value the caller passed is out of range or unknown
    │   └── BudgetError     the FLOPs budget cannot be read or cannot be met
    ├── CheckpointError     weights are missing, mis-shaped, NaN, or of another architecture
    ├── DataError           training or calibration data cannot be read
    ├── ExportError         a graph could not be written or did not pass its checks
    ├── EngineBuildError    a backend refused a graph
    ├── EngineMismatchError an engine or its inputs do not fit this machine, version or shape
    │   └── TargetError     a bundle has no engines of a target; also a UsageError
    ├── SamplingError       sampling gave numbers that are not finite
    ├── BundleError         a bundle is damaged, tampered with, or of a newer schema
    ├── StorageError        a file cannot be written: the disk is full, read-only, or in use by another process
    └── MissingDependencyError   an optional library is absent; the message says how to install it

Messages are one sentence that names the offending value and the cure. Vendor errors are mapped
once, where they enter, with ``raise ... from``. Warnings are ``DyexportWarning``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def reason(error: BaseException) -> str:
    """Return the first line of a vendor's message, or the name of an exception without one.

    Errors of the operating system are returned without their number and the path, which callers name.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class DyexportError(Exception):
    """Base of every error dyexport raises on purpose; ``exit_code`` is what the command line returns."""

    exit_code = 1


class DyexportWarning(UserWarning):
    """A decision of dyexport that the caller may want to change; the command line prints it as one line."""


class UsageError(DyexportError):
    """A value the caller passed is out of range or unknown."""

    exit_code = 2


class BudgetError(UsageError):
    """The FLOPs budget cannot be read, or no configuration of the model meets it.

    ``nearest`` is the FLOPs ratio that routers come nearest to it.
    """

    nearest: float | None = None


class CheckpointError(DyexportError):
    """Weights are missing, mis-shaped, not finite, or belong to another architecture."""


class DataError(DyexportError):
    """Training or calibration data is missing or cannot be read."""


class ExportError(DyexportError):
    """A graph could not be written, or did not pass its checks."""


class EngineBuildError(DyexportError):
    """A backend refused to build an engine from a graph."""


class EngineMismatchError(DyexportError):
    """An engine or its inputs do not fit this machine, version or shape."""


class TargetError(EngineMismatchError, UsageError):
    """A bundle has no engines of the target that the caller asked for."""


class SamplingError(DyexportError):
    """Sampling gave latents or pixels that are not finite: no picture."""


class BundleError(DyexportError):
    """A bundle is damaged, tampered with, or written by a newer schema."""


class StorageError(DyexportError):
    """A file or directory cannot be written, or another process is writing it."""


class MissingDependencyError(DyexportError):
    """An optional library is absent; ``install`` is the command that installs it, by itself where no extra has it."""

    def __init__(self, library: str, extra: str | None) -> None:
        package = library if extra is None else f"'dyexport[{extra}]'"
        self.library, self.install = library, f"pip install {package}"
        super().__init__(f"{library} is not installed; run: {self.install}")


EXTRAS = dict.fromkeys(("accelerate", "onnx", "onnx_ir", "onnxscript", "peft"), "build") | {
    "bitsandbytes": "low-memory",
    "onnxruntime": "cpu",
    "pyarrow": "parquet",
    "torchmetrics": "eval",
    "transformers": "prompts",
}
"""Extra that installs an optional module."""


@contextmanager
def missing_extras() -> Iterator[None]:
    """Turn the failed import of an optional library into ``MissingDependencyError``."""
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in EXTRAS:
            raise
        raise MissingDependencyError(library, EXTRAS[library]) from error
