"""Progress of a task, and an estimate of the time left."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import monotonic

WINDOW = 60.0  # seconds over which speed is measured, at least
REPORTS = 16  # reports over which speed is measured, at least: a step may take minutes


Progress = Callable[[int, int], None]
"""Called with the amount of work done, and the amount in total: steps, samples, tensors, files."""


def no_progress(done: int, total: int) -> None:
    """Report progress to nobody."""


class Pace:
    """Estimate of the time left, by the speed between the latest reports.

    Work done before the first report does not count, since a resumed run starts with it. A report of another total,
    or of less than the last one, begins a new phase.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._begin = clock()
        self._reports: deque[tuple[float, int]] = deque()  # times and counts
        self.done = 0
        self.total = 0

    def advance(self, done: int, total: int) -> None:
        """Record a report. Another thread may read the pace at any time."""
        now = self._clock()
        if total != self.total or done < self.done:
            self._reports = deque([(now, done)])
        else:
            self._reports.append((now, done))
        while len(self._reports) > REPORTS and now - self._reports[1][0] > WINDOW:
            self._reports.popleft()
        self.done, self.total = done, total

    @property
    def elapsed(self) -> float:
        """Seconds since the work began."""
        return self._clock() - self._begin

    @property
    def left(self) -> float | None:
        """Seconds left; None until the speed is known."""
        if self.done >= self.total:
            return 0.0 if self.total else None
        (first, before), (last, done) = self._reports[0], self._reports[-1]
        if done == before:
            return None
        seconds = (self.total - done) * (last - first) / (done - before)
        return max(seconds - (self._clock() - last), 0.0)

    def __str__(self) -> str:
        """Return percentage, count, time elapsed and time left."""
        parts = [f"{clock_time(self.elapsed)} elapsed"]
        if self.total:
            share = f"{100 * self.done / self.total:.0f} %"
            parts = [share, f"{count(self.done)} of {count(self.total)}", *parts]
        if self.left is not None:
            parts.append(f"{clock_time(self.left)} left")
        return ", ".join(parts)


def clock_time(seconds: float) -> str:
    """Return ``0:09``, ``12:34``, ``7:08:09`` or ``2 days 0:00:00``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if not hours:
        return f"{minute}:{second:02}"
    days, hour = divmod(hours, 24)
    return (f"{days} day{'s' if days > 1 else ''} " if days else "") + f"{hour}:{minute:02}:{second:02}"


def count(value: int) -> str:
    """Return a count in full, or in millions (M) or billions (G)."""
    for unit, size in (("G", 10**9), ("M", 10**6)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return str(value)
