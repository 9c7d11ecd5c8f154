"""A pool of processes that build plans at the same time, since TensorRT-RTX's builder uses one core.

As a script, this module is such a process. It ends with the build that started it, even if that is killed. The first
error ends all processes at once, which ``ProcessPoolExecutor`` cannot do: it waits for running calls.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from threading import Lock
from typing import Any, TypeVar

from dyexport.errors import DyexportError, EngineBuildError
from dyexport.progress import Progress

# Measured peaks: 0.54 GB for almost no weights, 0.65 GB for 43 MB of them, 5.1 GB for 1.1 GB.
BASE = 1_000_000_000  # bytes of memory that every builder takes
TIMES = 4  # bytes more for each byte of weights
PR_SET_PDEATHSIG = 1

Result = TypeVar("Result")


def max_workers(weights: Sequence[int], memory: int | None) -> int:
    """Return how many builds of so many bytes of weights fit into the cores and ``memory`` (default: what is free)."""
    import psutil

    free = psutil.virtual_memory().available if memory is None else memory
    peak = BASE + TIMES * max(weights, default=0)
    return max(min(len(os.sched_getaffinity(0)), len(weights), free // peak), 1)


class WorkerPool:
    """A pool that runs ``count`` jobs at a time, each ``submit`` in a process; with one, all in this process."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._lock = Lock()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def run(self, jobs: Sequence[Callable[[], Result]]) -> list[Result]:
        """Run jobs and return their results. The first error, or Ctrl-C, ends the others and is raised."""
        if self.count == 1:
            return [job() for job in jobs]
        with ThreadPoolExecutor(self.count) as pool:
            futures = [pool.submit(job) for job in jobs]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._stop()
                raise
        return [future.result() for future in futures]

    def submit(self, what: str, function: Callable[..., object], *arguments: Any, progress: Progress) -> None:
        """Call ``function(*arguments, progress=...)``, a function of a module, in a process, and wait for it.

        Raises what it raises, and ``EngineBuildError`` naming ``what`` if its process dies.
        """
        if self.count == 1:
            function(*arguments, progress=progress)
            return
        process = self._start()
        try:
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin:
                pickle.dump((os.getpid(), function, arguments), process.stdin)
            _relay(process, what, progress)
        finally:
            process.kill()
            process.wait()
            with self._lock:
                self._processes.discard(process)

    def _start(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._stopped:
                raise EngineBuildError("the build was stopped; run it again to go on")
            process = subprocess.Popen(
                [sys.executable, "-m", "dyexport.stages.workers"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                process_group=0,  # Ctrl-C is for the build, which ends its processes
            )
            self._processes.add(process)
        return process

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._processes:
                process.kill()


def _relay(process: subprocess.Popen[bytes], what: str, progress: Progress) -> None:
    """Report the progress of a process until it ends. Raises the exception that the process raised."""
    assert process.stdout is not None
    with process.stdout as replies:
        while True:
            try:
                kind, *values = pickle.load(replies)
            except EOFError:
                raise EngineBuildError(_exit_message(what, process.wait())) from None
            if kind == "failed":
                raise values[0]
            if kind == "done":
                return
            progress(*values)


def _exit_message(what: str, code: int) -> str:
    if code == -signal.SIGKILL:
        return f"the process building {what} was killed, as happens where memory runs out; give --memory less"
    return f"the process building {what} ended with exit code {code}; build again with --memory 0, one at a time"


def _serve() -> None:
    """Call one function and report on what was stdout; what libraries print goes to stderr."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent, function, arguments = pickle.load(sys.stdin.buffer)
    if os.getppid() != parent:  # it died before PR_SET_PDEATHSIG was set
        return

    def reply(*message: object) -> None:
        pickle.dump(message, replies)
        replies.flush()

    try:
        function(*arguments, progress=lambda done, total: reply("advanced", done, total))
        reply("done")
    except (DyexportError, OSError) as error:
        reply("failed", error)


if __name__ == "__main__":
    _serve()
