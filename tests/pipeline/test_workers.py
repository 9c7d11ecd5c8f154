"""Jobs in processes: they overlap, one's failure ends the others, and none outlives the build."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from dyexport.errors import EngineBuildError
from dyexport.progress import Progress
from dyexport.stages.ledger import Ledger, NullListener, Stage
from dyexport.stages.workers import BASE, TIMES, WorkerPool, max_workers

ROOT = Path(__file__).parents[2]
CORES = len(os.sched_getaffinity(0))


def wait_for(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end, "waited a minute"
        time.sleep(0.02)


def meet(mine: Path, other: Path, *, progress: Progress) -> None:
    """Ends only if the other one runs at the same time."""
    progress(1, 2)
    mine.touch()
    wait_for(other.exists)
    progress(2, 2)


def sleep(mine: Path, *, progress: Progress) -> None:
    mine.with_suffix(".new").write_text(str(os.getpid()))
    mine.with_suffix(".new").rename(mine)
    time.sleep(600)


def refuse(after: Path, *, progress: Progress) -> None:
    wait_for(after.exists)
    raise EngineBuildError("the builder refuses it; ask for less")


def touch(mine: Path, *, progress: Progress) -> None:
    print("what a library says")
    mine.write_text(str(os.getpid()))


def die(*, progress: Progress) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep_together(*pids: str) -> None:
    pool = WorkerPool(2)
    pool.run([partial(pool.submit, "it", sleep, Path(pid), progress=quiet) for pid in pids])


def quiet(done: int, total: int) -> None: ...


def gone(pid: Path) -> bool:
    """Whether a process has ended; who adopted it may not have noticed."""
    try:
        return Path(f"/proc/{pid.read_text()}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_two_run_at_once_and_tell_how_far_they_are(tmp_path: Path) -> None:
    pool, a, b = WorkerPool(2), tmp_path / "a", tmp_path / "b"
    seen: list[tuple[str, int, int]] = []
    jobs = [
        partial(pool.submit, "a", meet, a, b, progress=lambda *at: seen.append(("a", *at))),
        partial(pool.submit, "b", meet, b, a, progress=lambda *at: seen.append(("b", *at))),
    ]
    pool.run(jobs)
    assert sorted(seen) == [("a", 1, 2), ("a", 2, 2), ("b", 1, 2), ("b", 2, 2)]


def test_an_error_ends_the_others(tmp_path: Path) -> None:
    pool, slow, never = WorkerPool(2), tmp_path / "slow", tmp_path / "never"
    jobs = [
        partial(pool.submit, "slow", sleep, slow, progress=quiet),
        partial(pool.submit, "bad", refuse, slow, progress=quiet),
        partial(pool.submit, "never", touch, never, progress=quiet),
    ]
    with pytest.raises(EngineBuildError, match=r"^the builder refuses it; ask for less$"):
        pool.run(jobs)
    assert gone(slow)
    assert not never.exists()


def test_a_process_that_dies_is_named() -> None:
    pool = WorkerPool(2)
    with pytest.raises(EngineBuildError, match=r"the process building this plan was killed, .* --memory less"):
        pool.submit("this plan", die, progress=quiet)


def test_one_at_a_time_takes_no_process(tmp_path: Path) -> None:
    for count, here in ((1, True), (2, False)):
        pool = WorkerPool(count)
        pool.run([partial(pool.submit, "it", touch, tmp_path / "pid", progress=quiet)])
        assert ((tmp_path / "pid").read_text() == str(os.getpid())) == here


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_a_build(tmp_path: Path, way: signal.Signals) -> None:
    pids = [tmp_path / "a", tmp_path / "b"]
    script = (
        "import signal, sys; from tests.pipeline.test_workers import sleep_together as s;"
        "signal.signal(signal.SIGINT, signal.default_int_handler);"  # background jobs of shells ignore it
        "s(*sys.argv[1:])"
    )
    build = subprocess.Popen([sys.executable, "-c", script, *map(str, pids)], cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_for(lambda: all(pid.exists() for pid in pids))
    assert not any(map(gone, pids))
    build.send_signal(way)
    assert build.wait(60) != 0
    wait_for(lambda: all(map(gone, pids)))


def test_as_many_as_cores_and_memory_allow() -> None:
    gigabyte, plenty = 10**9, 10**15
    assert max_workers([1] * 1000, plenty) == CORES
    assert max_workers([1], plenty) == max_workers([1, 1], 0) == max_workers([], plenty) == 1
    assert max_workers([1, gigabyte], 2 * (BASE + TIMES * gigabyte) - 1) == 1
    assert max_workers([1, gigabyte], 2 * (BASE + TIMES * gigabyte)) == min(CORES, 2)


def test_stages_side_by_side_are_all_recorded(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, NullListener())
    stages = [
        Stage(name=f"{i}", output=f"{i}", inputs={"i": i}, make=lambda out, i=i: out.write_text(f"{i}") and None)
        for i in range(40)
    ]
    WorkerPool(8).run([partial(ledger.run, stage) for stage in stages])
    again = Ledger(tmp_path, NullListener())
    assert all(again.run(stage).reused for stage in stages)
