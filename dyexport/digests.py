"""SHA-256 of files, cached per user until a file changes.

A file is known by its device, inode, size, and times of modification and of change. The last cannot be set back by
``touch``, so a file that was tampered with is read again. A cache that cannot be read or written costs time only.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

from dyexport.files import user_cache

STORE = "digests.sqlite3"
KEPT = 100_000  # newest facts: 30 MB
TICK = 20_000_000  # nanoseconds; kernels' clocks of files tick at least every 10 ms
COARSE = 2_000_000_000  # nanoseconds, for file systems that count in seconds
LARGE = 1 << 22  # bytes, which take longer to read again than to wait for a tick
WAIT = 0.5  # seconds for another process that writes the cache

_TABLE = """
CREATE TABLE IF NOT EXISTS facts
(number INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, value TEXT NOT NULL, seal TEXT NOT NULL)
"""


class _Seen(NamedTuple):
    """The state of a file; ``settled`` if any later change is sure to change its times."""

    name: str
    settled: bool


def sha256_of(path: Path) -> str:
    """Hash a file; cached for the user by (device, inode, size, mtime_ns, ctime_ns)."""
    before = _see(path)
    if (known := recall(before.name)) is not None:
        return known
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _remember(path, before, digest)
    return digest


def remember(path: Path, sha256: str) -> None:
    """Record the hash of a file that this process has just moved or linked."""
    _remember(path, _see(path), sha256)


def _remember(path: Path, before: _Seen, sha256: str) -> None:
    if before.settled and _see(path).name == before.name:
        note(before.name, sha256)


def _see(path: Path) -> _Seen:
    """Return the state of a file; waits for a large file that was just written to settle."""
    status, now = path.stat(), time.time_ns()
    grain = TICK if status.st_ctime_ns % 1_000_000_000 else COARSE
    age = now - status.st_ctime_ns
    if status.st_size >= LARGE and grain == TICK and 0 <= age <= grain:
        time.sleep((grain - age) / 1e9)
        status, now = path.stat(), time.time_ns()
    facts = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return _Seen("file " + " ".join(map(str, facts)), now - status.st_ctime_ns > grain)


def once(fact: str, check: Callable[[], None]) -> None:
    """Run a check whose result cannot change, such as one of a file with some digest, unless it passed before."""
    if recall(fact) is None:
        check()
        note(fact, "passed")


def recall(name: str) -> str | None:
    """Return the value noted under a name; None without one, or if the cache cannot be read."""
    with suppress(sqlite3.Error, OSError), closing(_connect()) as store:
        row = store.execute("SELECT value, seal FROM facts WHERE name = ?", (name,)).fetchone()
        return row[0] if row is not None and row[1] == _seal(name, row[0]) else None
    return None


def note(name: str, value: str) -> None:
    """Store a value for later processes of this user; a cache that cannot be written is ignored."""
    try:
        with closing(_connect()) as store, store:
            row = (name, value, _seal(name, value))
            store.execute("INSERT OR REPLACE INTO facts (name, value, seal) VALUES (?, ?, ?)", row)
            store.execute("DELETE FROM facts WHERE number <= (SELECT max(number) FROM facts) - ?", (KEPT,))
    except (sqlite3.OperationalError, OSError):
        pass
    except sqlite3.DatabaseError:  # damaged: begin a new one
        with suppress(OSError):
            (user_cache() / STORE).unlink(missing_ok=True)


def _connect() -> sqlite3.Connection:
    """Open the cache for one operation, so that no connection is shared between threads or survives a fork."""
    folder = user_cache()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    store = sqlite3.connect(folder / STORE, timeout=WAIT)
    try:
        store.execute(
            "PRAGMA synchronous = OFF"
        )  # a flush takes longer than most files; what a crash tears, seals show
        store.execute(_TABLE)
    except BaseException:
        store.close()
        raise
    return store


def _seal(name: str, value: str) -> str:
    return hashlib.sha256(f"{name} {value}".encode()).hexdigest()
