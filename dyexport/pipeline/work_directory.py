"""The work directory of a build: whose it is, and its lock."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dyexport.errors import UsageError
from dyexport.files import storage_errors
from dyexport.pipeline.settings_file import SETTINGS
from dyexport.stages.ledger import Ledger, NullListener
from dyexport.stages.locking import held

LOCK = ".dyexport.lock"  # also what a work directory is known by
TRACKING = "tracking"  # folder of the curves and pictures of training, with a folder for each run


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """Lock the work directory. Raises ``StorageError`` while another process holds it.

    Stages replace files that have the names of their outputs, so a directory of anything else is refused with
    ``UsageError``. If no stage was made, no directory is left behind, unless it recorded settings before: a build that
    was stopped in its first stage resumes by them.
    """
    if work.is_file():
        raise UsageError(f"--work {work} is a file; give a directory")
    with storage_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        if any(work.iterdir()) and not (work / LOCK).is_file() and not Ledger(work, NullListener()).records:
            raise UsageError(f"--work {work} is not empty and not of a build; give another one")
    with held(work / LOCK, f"another build is using {work}; wait for it, or give another --work"):
        resumable = (work / SETTINGS).is_file()
        try:
            yield
        finally:
            if not resumable and {path.name for path in work.iterdir()} <= {LOCK, SETTINGS}:
                shutil.rmtree(work)
