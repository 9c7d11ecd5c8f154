"""Energy per call, from the counter that a machine has: NVML, a Jetson's power rails, or RAPL of an x86 CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dyexport.bench.nvml import Gpu
from dyexport.bench.tegrastats import TegrastatsCounter
from dyexport.bench.unavailable import Unavailable

POWERCAP = Path("/sys/class/powercap")
LEAST_SECONDS = 2.0  # counters are updated every 1 to 100 ms


class Counter(Protocol):
    """Counter of energy, idle power and other processes on the same device included."""

    @property
    def source(self) -> str:
        """Name of the counter for reports."""

    def joules(self) -> float:
        """Return the energy since some moment in the past; it never falls. Raises ``Unavailable``."""

    def close(self) -> None:
        """Stop counting."""


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Joules, and the counter that they come from; or None, with the reason."""

    joules: float | None
    source: str | None = None
    reason: str | None = None

    def scaled(self, factor: float) -> Energy:
        joules = None if self.joules is None else self.joules * factor
        return Energy(joules=joules, source=self.source, reason=self.reason)


class RaplCounter:
    """Energy of the CPU packages of a machine; their counters start again at zero after ``max_energy_range_uj``."""

    source = "RAPL packages"

    def __init__(self, zones: Sequence[Path]) -> None:
        self._zones = zones
        self._ranges = [_number(zone / "max_energy_range_uj") for zone in zones]
        self._last = [_number(zone / "energy_uj") for zone in zones]
        self._microjoules = 0

    @classmethod
    def open(cls, powercap: Path = POWERCAP) -> RaplCounter:
        """Open all packages. Raises ``Unavailable`` if there are none, or if they may not be read."""
        zones = sorted(zone for zone in powercap.glob("intel-rapl:*") if zone.name.count(":") == 1)
        if not zones:
            raise Unavailable("the system has no RAPL counters")
        return cls(zones)

    def joules(self) -> float:
        """Return the energy since the counter was opened. It must be read at least once per range."""
        for index, (zone, full) in enumerate(zip(self._zones, self._ranges, strict=True)):
            now = _number(zone / "energy_uj")
            grown = now - self._last[index]
            self._microjoules += grown if grown >= 0 else grown + full
            self._last[index] = now
        return self._microjoules / 1e6

    def close(self) -> None:
        """Do nothing: the system counts on."""


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError) as error:
        raise Unavailable(f"{path} cannot be read; energy counters are root's by default") from error


def find_counter(device: str) -> tuple[Counter | None, str | None]:
    """Return the energy counter of a device, or None and the reason why there is none."""
    on_gpu: list[Callable[[], Counter]] = [lambda: _that_counts(Gpu.open(device)), TegrastatsCounter.open]
    on_cpu: list[Callable[[], Counter]] = [TegrastatsCounter.open, RaplCounter.open]
    reasons = []
    for open_counter in on_cpu if device == "cpu" else on_gpu:
        try:
            return open_counter(), None
        except Unavailable as error:
            reasons.append(str(error))
    return None, f"no counter on this machine: {'; '.join(reasons)}"


def _that_counts(counter: Counter) -> Counter:
    """Return a counter once it has been read: some GPUs have none."""
    counter.joules()
    return counter


@dataclass(frozen=True, kw_only=True)
class Meter:
    """The energy counter of a device, or the reason why there is none."""

    counter: Counter | None
    reason: str | None = None

    def per_call(
        self, run: Callable[[], object], clock: Callable[[], float], least_seconds: float = LEAST_SECONDS
    ) -> Energy:
        """Repeat a call for at least ``least_seconds``, and divide the energy by the number of calls."""
        if self.counter is None:
            return Energy(joules=None, reason=self.reason)
        try:
            begin, before, calls = clock(), self.counter.joules(), 0
            while clock() - begin < least_seconds:
                run()
                calls += 1
            return Energy(joules=(self.counter.joules() - before) / calls, source=self.counter.source)
        except Unavailable as error:
            return Energy(joules=None, reason=str(error))


@contextmanager
def open_meter(device: str) -> Iterator[Meter]:
    """Open the meter of a device, and close it at the end."""
    counter, reason = find_counter(device)
    try:
        yield Meter(counter=counter, reason=reason)
    finally:
        if counter is not None:
            counter.close()
