"""Description of a machine for reports: devices, versions, and the temperature and clocks around a measurement."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import psutil

from dyexport.bench.energy import Counter
from dyexport.bench.nvml import Gpu
from dyexport.bench.tegrastats import TegrastatsCounter
from dyexport.bench.unavailable import Unavailable

CPUINFO = Path("/proc/cpuinfo")
BOARD = Path("/proc/device-tree/model")  # of ARM boards, such as a Jetson
LIBRARIES = {
    "torch": ("torch",),
    "diffusers": ("diffusers",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt-rtx-cu13-bindings",),
}
MOST_DROP = 0.10  # of a clock
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A machine and its software; None for what is absent."""

    device: str
    device_name: str
    cpu: str
    threads: int
    python: str
    system: str
    driver: str | None
    versions: dict[str, str | None]


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Temperature in degrees Celsius and clocks in MHz at one moment: of the GPU, or of a CPU that runs alone."""

    celsius: float | None = None
    cpu_mhz: float | None = None
    gpu_mhz: float | None = None
    memory_mhz: float | None = None


def describe(device: str, threads: int) -> Environment:
    """Describe this machine and the device that a benchmark ran on."""
    cpu = cpu_model()
    return Environment(
        device=device,
        device_name=cpu if device == "cpu" else _gpu_name(device),
        cpu=cpu,
        threads=threads,
        python=platform.python_version(),
        system=platform.platform(),
        driver=None if device == "cpu" else _of_gpu(device, lambda gpu: gpu.driver),
        versions={name: _version(distributions) for name, distributions in LIBRARIES.items()},
    )


def cpu_model(cpuinfo: Path = CPUINFO, board: Path = BOARD) -> str:
    """Return the name of the CPU, or of the board of an ARM machine."""
    for path in (board, cpuinfo):
        try:
            text = path.read_text()
        except OSError:
            continue
        if path == board:
            return text.strip("\0\n ")
        fields = (line.partition(":") for line in text.splitlines())
        if names := [value.strip() for key, _, value in fields if key.strip() == "model name"]:
            return names[0]
    return platform.processor() or platform.machine()


def _version(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _gpu_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device)


def _of_gpu(device: str, read: Callable[[Gpu], T]) -> T | None:
    try:
        gpu = Gpu.open(device)
    except Unavailable:
        return None
    try:
        return read(gpu)
    except Unavailable:
        return None
    finally:
        gpu.close()


def conditions(device: str, counter: Counter | None) -> Conditions:
    """Read temperature and clocks; a running ``tegrastats`` counter gives those of a Jetson."""
    cpu_mhz = _cpu_mhz()
    if isinstance(counter, TegrastatsCounter) and (line := counter.latest) is not None:
        return Conditions(celsius=line.gpu_celsius, cpu_mhz=cpu_mhz, gpu_mhz=line.gpu_mhz, memory_mhz=line.memory_mhz)
    if device == "cpu":
        return Conditions(celsius=_hottest(), cpu_mhz=cpu_mhz)
    return Conditions(
        celsius=_of_gpu(device, Gpu.celsius),
        cpu_mhz=cpu_mhz,
        gpu_mhz=_of_gpu(device, Gpu.clock_mhz),
        memory_mhz=_of_gpu(device, Gpu.memory_clock_mhz),
    )


def _cpu_mhz() -> float | None:
    frequency = psutil.cpu_freq()
    return None if frequency is None else float(frequency.current)


def _hottest() -> float | None:
    read: Callable[[], dict[str, list[Any]]] = getattr(psutil, "sensors_temperatures", dict)  # not on every system
    sensors = read()
    return max((float(sensor.current) for group in sensors.values() for sensor in group), default=None)


def throttling(before: Conditions, after: Conditions) -> list[str]:
    """Return a warning for each clock that fell by more than 10 % while something was timed."""
    clocks = {"GPU": "gpu_mhz", "GPU memory": "memory_mhz", "CPU": "cpu_mhz"}
    warnings = []
    for name, field in clocks.items():
        first, last = getattr(before, field), getattr(after, field)
        if first and last is not None and last < first * (1 - MOST_DROP):
            warnings.append(f"the {name} clock fell from {first:.0f} to {last:.0f} MHz while timing")
    return warnings
