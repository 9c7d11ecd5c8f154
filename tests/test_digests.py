"""A file's digest is remembered until the file is touched, and a cache that fails costs time only."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path

import pytest

from dyexport.digests import LARGE, STORE, TICK, note, recall, remember, sha256_of


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("DYEXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    return path


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Worth waiting for until it has settled."""
    path = tmp_path / "large"
    path.write_bytes(b"x" * LARGE)
    return path


def bytes_read() -> int:
    """By this process, whether from the disk or from memory."""
    facts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(facts["rchar"])


def test_a_file_is_read_once(cache: Path, large: Path) -> None:
    read = [bytes_read()]
    for _ in range(3):
        assert sha256_of(large) == digest(b"x" * LARGE)
        read.append(bytes_read())
    assert read[1] - read[0] >= LARGE
    assert read[3] - read[1] < LARGE / 10


def test_a_change_just_after_is_noticed(cache: Path, file: Path) -> None:
    for number in range(50):
        content = f"{number:03}".encode()
        file.write_bytes(content)
        assert sha256_of(file) == digest(content)


def test_a_change_with_its_time_put_back_is_noticed(cache: Path, file: Path) -> None:
    assert sha256_of(file) == digest(b"one")
    times = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_mtime_ns == times.st_mtime_ns
    assert sha256_of(file) == digest(b"two")


def test_what_was_moved_is_remembered(cache: Path, large: Path) -> None:
    known = sha256_of(large)
    large.rename(large.with_name("moved"))
    remember(large.with_name("moved"), known.upper())  # could not come from reading
    assert sha256_of(large.with_name("moved")) == known.upper()


def test_other_processes_know(cache: Path, large: Path) -> None:
    remember(large, "known")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(sha256_of, large).result() == "known"


def test_a_small_file_is_remembered_once_it_is_older(cache: Path, file: Path) -> None:
    remember(file, "too young to tell from what may be written next")
    assert sha256_of(file) == digest(b"one")
    while time.time_ns() - file.stat().st_ctime_ns < 2 * TICK:
        time.sleep(0.01)
    remember(file, "known")
    assert sha256_of(file) == "known"


def test_a_fact_that_changed_on_the_disk_is_not_believed(cache: Path) -> None:
    note("a", "1")
    with closing(sqlite3.connect(cache / STORE)) as store, store:
        store.execute("UPDATE facts SET value = '2'")
    assert recall("a") is None


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_and_threads_share_it(cache: Path, tmp_path: Path, method: str) -> None:
    files = [tmp_path / f"{number}.bin" for number in range(20)]
    for path in files:
        path.write_bytes(path.name.encode())
    with ProcessPoolExecutor(3, mp_context=get_context(method)) as processes, ThreadPoolExecutor(3) as threads:
        found = [list(processes.map(sha256_of, files)), list(threads.map(sha256_of, files))]
    expected = [digest(path.name.encode()) for path in files]
    assert found == [expected, expected]


@pytest.mark.parametrize("harm", ["a file in its place", "noise", "half", "a folder", "read-only"])
def test_a_broken_cache_costs_time_only(cache: Path, file: Path, harm: str) -> None:
    if harm == "a file in its place":
        cache.touch()
    elif harm == "a folder":
        (cache / STORE).mkdir(parents=True)
    else:
        sha256_of(file)
        store = cache / STORE
        if harm == "read-only":
            store.chmod(0o400)
            cache.chmod(0o500)
        else:
            store.write_bytes(b"noise" * 4000 if harm == "noise" else store.read_bytes()[:5000])
    for content in (b"one", b"two"):
        file.write_bytes(content)
        assert sha256_of(file) == digest(content)
    cache.chmod(0o700)


def test_a_damaged_cache_is_begun_again(cache: Path, file: Path) -> None:
    sha256_of(file)
    for name in cache.iterdir():
        name.write_bytes(b"noise" * 4000)
    note("a", "1")
    note("a", "2")
    assert recall("a") == "2"


def test_a_missing_file_is_an_error(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sha256_of(tmp_path / "nothing")
