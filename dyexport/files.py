"""Writing so that a kill or a full disk leaves what was there before, and says so in one sentence."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError

from dyexport.errors import StorageError

PARTIAL = ".partial-"


def check_writable(path: Path) -> None:
    """Find out now, not after hours, that a directory cannot be made or written."""
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    try:
        TemporaryDirectory(dir=nearest, prefix=PARTIAL).cleanup()
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error)) from error


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what the file system says into one ``StorageError``."""
    try:
        yield
    except OSError as error:
        raise _unwritable(error.filename or path, error.strerror or str(error)) from error
    except SafetensorError as error:
        if "os error" not in str(error):
            raise
        raise _unwritable(path, str(error)) from error


def _unwritable(path: Path | str, why: str) -> StorageError:
    return StorageError(f"cannot write {path}: {why}; make room, or choose another directory, then repeat")


def write_atomically(path: Path, content: bytes) -> None:
    partial = path.with_name(PARTIAL + path.name)
    partial.write_bytes(content)
    sync(partial)
    partial.replace(path)
    flush(path.parent)


def sync(path: Path) -> None:
    """Flush a file, or a directory and all in it, to the disk. What a link leads to is not ours."""
    if path.is_symlink():
        return
    for child in path.iterdir() if path.is_dir() else ():
        sync(child)
    flush(path)


def flush(path: Path) -> None:
    """A file's bytes, or a directory's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
