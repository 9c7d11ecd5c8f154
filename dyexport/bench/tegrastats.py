"""Power, temperature and clocks of a Jetson, from the lines that NVIDIA's ``tegrastats`` prints."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event, Thread
from time import perf_counter

from dyexport.bench.unavailable import Unavailable

INTERVAL_MS = 100
FIRST_LINE = 5.0  # seconds to wait for it
BOARD_INPUTS = ("VDD_IN", "POM_5V_IN", "VIN")  # supply of the whole module; other boards report its parts alone
ABSENT = -256.0  # temperature of a sensor that is switched off
GPU_SENSORS = ("gpu", "tj", "thermal")  # junction and overall temperature, where the GPU's sensor is off

_RAIL = re.compile(r"\b([A-Z][A-Z0-9_]*) (\d+)(?:mW)?/\d+(?:mW)?(?=\s|$)")
_SENSOR = re.compile(r"\b(\w+)@(-?\d+(?:\.\d+)?)C\b")
_GPU_CLOCK = re.compile(r"\bGR3D_FREQ \d+%@\[?(\d+)")
_MEMORY_CLOCK = re.compile(r"\bEMC_FREQ \d+%@(\d+)")


@dataclass(frozen=True, kw_only=True)
class TegraLine:
    """One line: watts by rail, degrees Celsius by sensor, clocks in MHz. None where the board does not report it."""

    watts: dict[str, float]
    celsius: dict[str, float]
    gpu_mhz: int | None
    memory_mhz: int | None

    @property
    def total_watts(self) -> float | None:
        """Power of the whole module: of its input where it is measured, otherwise of all rails together."""
        for name in BOARD_INPUTS:
            if name in self.watts:
                return self.watts[name]
        return sum(self.watts.values()) if self.watts else None

    @property
    def gpu_celsius(self) -> float | None:
        return next((self.celsius[name] for name in GPU_SENSORS if name in self.celsius), None)


def parse_line(line: str) -> TegraLine:
    """Parse a line of any board: ``VDD_IN 3913mW/3922mW`` and ``CPU 311/311`` are present and mean milliwatts."""
    gpu, memory = _GPU_CLOCK.search(line), _MEMORY_CLOCK.search(line)
    sensors = {name.lower(): float(value) for name, value in _SENSOR.findall(line)}
    return TegraLine(
        watts={name: int(value) / 1e3 for name, value in _RAIL.findall(line) if name != "NC"},
        celsius={name: value for name, value in sensors.items() if value != ABSENT},
        gpu_mhz=int(gpu[1]) if gpu else None,
        memory_mhz=int(memory[1]) if memory else None,
    )


class PowerIntegral:
    """Energy from samples of power, each of which holds until the next one."""

    def __init__(self) -> None:
        self._joules = 0.0
        self._watts = 0.0
        self._since: float | None = None

    def add(self, now: float, watts: float) -> None:
        """Record a sample at ``now`` in seconds."""
        self._joules, self._watts, self._since = self.joules(now), watts, now

    def joules(self, now: float) -> float:
        """Return the energy from the first sample until ``now``."""
        return self._joules if self._since is None else self._joules + self._watts * (now - self._since)


class TegrastatsCounter:
    """Energy of a Jetson module since the first line of a ``tegrastats`` process that runs in the background."""

    source = "tegrastats"

    def __init__(self, command: tuple[str, ...], clock: Callable[[], float] = perf_counter) -> None:
        self._clock = clock
        self._integral = PowerIntegral()
        self._first = Event()
        self.latest: TegraLine | None = None
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self._reader = Thread(target=self._read, name="tegrastats", daemon=True)
        self._reader.start()

    @classmethod
    def open(cls) -> TegrastatsCounter:
        """Start ``tegrastats``. Raises ``Unavailable`` without it, or if it reports no power."""
        path = shutil.which("tegrastats")
        if path is None:
            raise Unavailable("tegrastats is not installed")
        return cls.started((path, "--interval", str(INTERVAL_MS)))

    @classmethod
    def started(cls, command: tuple[str, ...]) -> TegrastatsCounter:
        """Start a command that prints lines of ``tegrastats``, and wait for the first one with power rails."""
        counter = cls(command)
        if not counter._first.wait(FIRST_LINE):
            counter.close()
            raise Unavailable("tegrastats reports no power rails")
        return counter

    def _read(self) -> None:
        assert self._process.stdout is not None
        for text in self._process.stdout:
            line = parse_line(text)
            self.latest = line
            if line.total_watts is not None:
                self._integral.add(self._clock(), line.total_watts)
                self._first.set()

    def joules(self) -> float:
        return self._integral.joules(self._clock())

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._reader.join()
        if self._process.stdout is not None:
            self._process.stdout.close()
