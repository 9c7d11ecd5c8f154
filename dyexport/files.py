"""Atomic writes: a kill or a full disk leaves the previous contents."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError

from dyexport.errors import StorageError

PARTIAL = ".partial-"
TENSORS = ".safetensors"
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_numbers = count()
_in_use: set[Path] = set()


@contextmanager
def replacing(path: Path, *, follow_symlinks: bool = True) -> Iterator[Path]:
    """Yield a temporary name in path's folder to write a file or a folder under.

    On success it is flushed to disk and renamed onto ``path``: whatever is there is whole at every moment. It is
    removed on any exception. Links are followed unless ``follow_symlinks`` is off.
    Raises ``StorageError`` for a disk that is full or read-only, and for a path that is a device or a pipe.
    """
    place = Path(os.path.realpath(path)) if follow_symlinks else path.parent.resolve() / path.name
    with storage_errors(path):
        check_replaceable(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        clear_partials(place)
        partial = _partial(place)
        _in_use.add(partial)
        try:
            yield partial
            _share_tensors(partial, place)
            sync(partial)
            put(partial, place)
            flush(place.parent)
        finally:
            remove(partial)
            _in_use.discard(partial)


def _partial(place: Path) -> Path:
    return place.with_name(f"{PARTIAL}{os.getpid()}-{next(_numbers)}-{place.name}")


def _share_tensors(path: Path, place: Path) -> None:
    """Give new files of tensors the mode of any new file: safetensors lets only their owner read them."""
    found = path.rglob(f"*{TENSORS}") if path.is_dir() else [path] if path.suffix == TENSORS else []
    private = [file for file in found if file.stat().st_nlink == 1 and not file.stat().st_mode & 0o077]
    if private:
        probe = _partial(place)
        with probe.open("wb") as new:
            mode = stat.S_IMODE(os.fstat(new.fileno()).st_mode)
        remove(probe)
        for file in private:
            file.chmod(mode)


def check_replaceable(path: Path) -> None:
    """Raise ``StorageError`` for what cannot be replaced as a whole: a device, a pipe, a socket, the root."""
    if not path.name:
        raise StorageError(f"cannot write {path}: it does not name a file or folder; give a name")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise StorageError(f"cannot write {path}: it is a device or a pipe; give the name of a file")


def check_file(path: Path) -> None:
    """Raise ``StorageError`` early if a file cannot be written under a name."""
    with storage_errors(path):
        place = Path(os.path.realpath(path))
        check_replaceable(place)
        if place.is_dir():
            raise _folder(path)
        check_writable(place.parent)


def _folder(path: Path) -> StorageError:
    return StorageError(f"cannot write {path}: it is a folder; give the name of a file")


def put(partial: Path, place: Path) -> None:
    """Rename a file or folder onto another, in one step; ``partial`` may hold the other afterwards."""
    if place.is_symlink() or not place.is_dir():
        if partial.is_dir():
            remove(place)
        os.replace(partial, place)
    elif not partial.is_dir():
        raise _folder(place)
    elif not _exchanged(partial, place):
        old = _aside(place)
        place.rename(old)
        partial.rename(place)
        remove(old)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names in one step; return False if the kernel or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # an old C library
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _aside(place: Path) -> Path:
    """Return the temporary name of a folder that is being replaced in two steps."""
    return place.with_name(f"{PARTIAL}old-{place.name}")


def clear_partials(place: Path) -> None:
    """Clean up after killed processes: restore a folder that was set aside, remove partial files of ``place``."""
    old = _aside(place)
    if old.exists():
        if place.exists():
            remove(old)
        else:
            old.rename(place)
    for entry in list(place.parent.iterdir()) if place.parent.is_dir() else ():
        match = re.fullmatch(rf"{re.escape(PARTIAL)}(?:(\d+)-\d+-)?{re.escape(place.name)}", entry.name)
        if match and entry not in _in_use and not _runs(int(match[1] or 0)):
            remove(entry)


def _runs(process: int) -> bool:
    """Tell whether another process has this number; this process knows its own files by ``_in_use``."""
    if process in (0, os.getpid()):
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def user_cache() -> Path:
    """Return the user's cache folder: ``DYEXPORT_CACHE``, or one in ``XDG_CACHE_HOME``."""
    if own := os.environ.get("DYEXPORT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "dyexport"


def check_writable(path: Path) -> None:
    """Raise ``StorageError`` early if a directory cannot be made or written."""
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    try:
        TemporaryDirectory(dir=nearest, prefix=PARTIAL).cleanup()
    except OSError as error:
        why = error.strerror or error
        raise StorageError(
            f"cannot write {path}: nothing can be made in {nearest} ({why}); choose another directory"
        ) from error


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn errors of the file system into one ``StorageError``."""
    try:
        yield
    except OSError as error:
        raise _unwritable(_blamed(error, path), error.strerror or str(error)) from error
    except SafetensorError as error:
        if "os error" not in str(error):
            raise
        raise _unwritable(path, str(error)) from error


def _blamed(error: OSError, path: Path) -> Path | str:
    """Return the file to blame: a copy's destination, not its source; the final name, not a temporary one."""
    name = error.filename2 or error.filename
    if not isinstance(name, str) or any(part.startswith(PARTIAL) for part in Path(name).parts):
        return path
    return name


def _unwritable(path: Path | str, why: str) -> StorageError:
    return StorageError(f"cannot write {path}: {why}; make room, or choose another directory, then repeat")


def write_atomically(path: Path, content: bytes) -> None:
    with replacing(path) as partial:
        partial.write_bytes(content)


def sync(path: Path) -> None:
    """Flush a file, or a directory and everything in it, to the disk; links are not followed."""
    if path.is_symlink() or not (path.is_file() or path.is_dir()):
        return
    for child in path.iterdir() if path.is_dir() else ():
        sync(child)
    flush(path)


def flush(path: Path) -> None:
    """Flush a file's bytes, or a directory's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hard_linked(source: Path, target: Path) -> bool:
    """Give a file or a link a second name; return False if the file system cannot."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        return False
    return True


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
