"""Locks of folders that only one process may write at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dyexport.errors import StorageError
from dyexport.files import PARTIAL, clear_partials, storage_errors

LOCK = f"{PARTIAL}lock"


@contextmanager
def locked_output(out: Path) -> Iterator[None]:
    """Lock a folder for writing, and remove what a killed build left in it.

    Raises ``StorageError`` while another process holds it.
    """
    place = Path(os.path.realpath(out))
    inside = place.is_dir() and not renamable(place)
    lock = place / LOCK if inside else place.with_name(f"{LOCK}-{place.name}")
    with storage_errors(out):
        lock.parent.mkdir(parents=True, exist_ok=True)
    with held(lock, f"another command is writing {out}; wait for it, or give another directory"):
        try:
            with storage_errors(out):
                clear_partials(place)
            yield
        finally:
            with suppress(OSError):  # a lock file that stays is reused
                lock.unlink()


@contextmanager
def held(lock: Path, refusal: str) -> Iterator[None]:
    """Lock a file. Raises ``StorageError`` with the message ``refusal`` while another process holds it."""
    while True:
        with storage_errors(lock.parent):
            file = lock.open("w")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StorageError(refusal) from error
            if not lock.exists() or not os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                continue  # its last holder removed it
            yield
            return


def renamable(folder: Path) -> bool:
    """Return whether a folder can be renamed: no file system is mounted there, and its parent is writable."""
    mounted = any(os.fsencode(line.split()[4]) == _escaped(folder) for line in _mounts())
    return not mounted and os.access(folder.parent, os.W_OK | os.X_OK)


def _mounts() -> list[str]:
    try:
        return Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []


def _escaped(folder: Path) -> bytes:
    """Return a path as the kernel escapes it."""
    return os.fsencode(folder).replace(b"\\", rb"\134").replace(b" ", rb"\040").replace(b"\t", rb"\011")
