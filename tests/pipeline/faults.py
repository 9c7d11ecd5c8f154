"""Makes any write fail: a full disk, Ctrl-C or a kill at each moment at which a process changes the disk, by turns."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import BuiltinFunctionType
from typing import Any, Literal

Fault = Literal["full", "interrupt", "kill"]

CHANGES = {"os.rename", "os.link", "os.symlink", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod"}
CALLS = {"write", "writelines", "fsync", "ftruncate", "sendfile", "serialize_file"}  # whose paths Python does not tell
TEMPORARY = re.compile(r"partial-([0-9]+-[0-9]+|\w{8}$)")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class WentOn(Exception):
    """A build began another stage although a change had failed, which it can do without."""


class Writes:
    """Counts what changes the disk below ``root``, and makes the first change fail whose name is not in ``spared``.

    A change is named by the stage it belongs to, what it does to which file, and how often it did so before.
    """

    def __init__(self, root: Path, spared: set[str], fault: Fault) -> None:
        self.stage = "start"
        self.failed: str | None = None
        self._root, self._spared, self._fault = str(root), spared, fault
        self._counts: Counter[str] = Counter()
        self._place = ""

    def start(self) -> None:
        """From here on, until this process ends."""
        sys.addaudithook(self._audit)
        sys.setprofile(self._profile)

    # a listener of the build

    def started(self, stage: str, why: str) -> None:
        if self.failed is not None:
            raise WentOn
        self.stage = stage

    def advanced(self, stage: str, done: int, total: int, detail: str = "") -> None: ...

    def finished(self, stage: str, seconds: float, *, reused: bool) -> None:
        self.stage = f"after {stage}"

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.failed is not None:
            return
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & WRITING:
                return
        elif event == "ctypes.dlsym" and arguments[1] == "renameat2":
            path = f"{self._root}/exchange"
        elif event in CHANGES:
            path = arguments[1] if event in ("os.rename", "os.link", "os.symlink") else arguments[0]
        else:
            return
        path = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if os.path.lexists(path) == (event == "os.mkdir") and event in ("os.mkdir", "os.remove", "os.rmdir"):
            return  # which changes nothing
        if path.startswith(self._root) or (event in ("os.remove", "os.rmdir") and not path.startswith("/")):
            self._place = f"{event} {TEMPORARY.sub('partial', path.removeprefix(self._root))}"
            self._meet(self._place)

    def _profile(self, frame: Any, event: str, function: Any) -> None:
        if event != "c_call" or not isinstance(function, BuiltinFunctionType) or function.__name__ not in CALLS:
            return
        if "write" in function.__name__ and not str(getattr(function.__self__, "name", "")).startswith(self._root):
            return  # to a stream, or a file elsewhere
        self._meet(f"{function.__name__} after {self._place}")

    def _meet(self, change: str) -> None:
        if self.failed is not None:
            return
        name = f"{self.stage}: {change} #{self._counts[change, self.stage]}"  # type: ignore[index]
        self._counts[change, self.stage] += 1  # type: ignore[index]
        if name in self._spared:
            return
        self.failed = name
        _tell(name)
        if self._fault == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._fault == "interrupt":
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGKILL)


_pipe = -1


def _tell(line: str) -> None:
    os.write(_pipe, f"{line}\n".encode())


def run_with(root: Path, spared: set[str], fault: Fault, work: Callable[[Writes], Any]) -> tuple[str | None, str]:
    """Work in a forked process; the change that failed, None if none did, and how the work ended."""
    global _pipe
    reader, _pipe = os.pipe()
    if (child := os.fork()) == 0:
        try:
            writes = Writes(root, spared, fault)
            writes.start()
            try:
                work(writes)
                end = "done"
            except BaseException as error:
                end = f"{type(error).__name__}: {error}"
            sys.setprofile(None)
            writes.failed = writes.failed or ""
            _tell(f"END {' '.join(end.split())}")
        finally:
            os._exit(0)
    os.close(_pipe)
    with os.fdopen(reader) as file:
        lines = file.read().splitlines()
    os.waitpid(child, 0)
    failed = lines[0] if lines and not lines[0].startswith("END") else None
    end = lines[-1].removeprefix("END ") if lines and lines[-1].startswith("END") else "killed"
    return failed, end


def each_write(
    root: Path, fault: Fault, work: Callable[[Writes], Any], reset: Callable[[], None] = lambda: None
) -> Iterator[tuple[str, str]]:
    """Do the work again and again, each time failing at the first change that has not failed yet, until none is left.

    Yields each change and how the work ended, at a time when nothing runs. ``reset`` is called before each time;
    without it, work goes on from where it failed.
    """
    spared: set[str] = set()
    while True:
        reset()
        failed, end = run_with(root, spared, fault, work)
        if failed is None:
            assert end == "done", end
            return
        spared.add(failed)
        yield failed, end
