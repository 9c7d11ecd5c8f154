"""Energy counters read recorded series: NVML, RAPL with its wraparound, and lines of ``tegrastats``."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dyexport.bench.energy import Energy, Meter, RaplCounter, find_counter
from dyexport.bench.environment import Conditions, conditions, throttling
from dyexport.bench.nvml import Gpu
from dyexport.bench.tegrastats import PowerIntegral, TegrastatsCounter, parse_line
from dyexport.bench.unavailable import Unavailable

# Lines as boards print them, from recordings in public repositories. The first has no units, as before JetPack 5.
NANO = (
    "RAM 1766/3964MB (lfb 197x4MB) SWAP 0/2048MB (cached 0MB) CPU [24%@1224,15%@1224,13%@1224,10%@1224] EMC_FREQ 0% "
    "GR3D_FREQ 0% PLL@21C CPU@25C PMIC@100C GPU@23.5C AO@33.5C thermal@24.5C POM_5V_IN 2545/2547 POM_5V_GPU 0/0 "
    "POM_5V_CPU 549/529"
)
AGX_XAVIER = (
    "RAM 721/31927MB (lfb 7291x4MB) SWAP 0/15963MB (cached 0MB) CPU [2%@1190,0%@1190,0%@1190,0%@1190,off,off,off,off] "
    "EMC_FREQ 0%@665 GR3D_FREQ 0%@318 APE 150 MTS fg 0% bg 0% AO@37.5C GPU@37.5C Tdiode@40C PMIC@100C AUX@36C "
    "CPU@37.5C thermal@36.9C Tboard@37C GPU 0/0 CPU 311/311 SOC 932/932 CV 0/0 VDDRQ 621/621 SYS5V 1482/1482"
)
ORIN_NANO = (
    "10-08-2026 04:38:21 RAM 1343/7620MB (lfb 157x4MB) SWAP 165/3810MB (cached 3MB) "
    "CPU [0%@1497,0%@729,0%@729,0%@729,0%@729,0%@729] EMC_FREQ 15%@204 GR3D_FREQ 0%@[305] NVDEC off NVJPG off VIC off "
    "OFA off APE 200 cpu@48.562C soc2@46.593C soc0@48.625C gpu@49.625C tj@49.312C soc1@47.937C "
    "VDD_IN 5251mW/8535mW VDD_CPU_GPU_CV 512mW/1944mW VDD_SOC 2720mW/3659mW"
)
AGX_ORIN = (
    "04-11-2025 10:36:27 RAM 4321/62801MB (lfb 1759x4MB) SWAP 19/31400MB (cached 0MB) CPU [0%@729,0%@729,0%@729] "
    "EMC_FREQ 0%@2133 GR3D_FREQ 0%@[0,0] VIC_FREQ 729 APE 174 CV0@-256C CPU@44.562C Tboard@32C SOC2@40.093C Tdiode@33C "
    "SOC0@41.093C CV1@-256C GPU@-256C tj@44.343C SOC1@41.25C CV2@-256C VDD_GPU_SOC 2340mW/2340mW "
    "VDD_CPU_CV 390mW/390mW VIN_SYS_5V0 4025mW/4025mW NC 0mW/0mW VDDQ_VDD2_1V8AO 301mW/301mW NC 0mW/0mW"
)


@pytest.mark.parametrize(
    ("text", "watts", "celsius", "gpu_mhz", "memory_mhz"),
    [
        (NANO, 2.545, 23.5, None, None),
        (AGX_XAVIER, 0.311 + 0.932 + 0.621 + 1.482, 37.5, 318, 665),
        (ORIN_NANO, 5.251, 49.625, 305, 204),
        (AGX_ORIN, 2.340 + 0.390 + 4.025 + 0.301, 44.343, 0, 2133),  # the GPU's sensor is off: of the junction
        ("RAM 1/2MB (lfb 1x4MB) CPU [1%@729] GR3D_FREQ 3%", None, None, None, None),
        ("", None, None, None, None),
    ],
    ids=["nano", "agx-xavier", "orin-nano", "agx-orin", "no-rails", "empty"],
)
def test_lines_of_boards(
    text: str, watts: float | None, celsius: float | None, gpu_mhz: int | None, memory_mhz: int | None
) -> None:
    line = parse_line(text)
    assert line.total_watts == (None if watts is None else pytest.approx(watts))
    assert (line.gpu_celsius, line.gpu_mhz, line.memory_mhz) == (celsius, gpu_mhz, memory_mhz)


def test_memory_is_no_rail() -> None:
    assert parse_line(ORIN_NANO).watts.keys() == {"VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"}


def test_power_holds_until_the_next_sample() -> None:
    integral = PowerIntegral()
    assert integral.joules(5.0) == 0.0
    integral.add(10.0, 2.0)
    assert integral.joules(13.0) == pytest.approx(6.0)
    integral.add(14.0, 5.0)
    assert integral.joules(14.0) == pytest.approx(8.0)
    assert integral.joules(16.0) == pytest.approx(18.0)


def printing(*lines: str) -> tuple[str, ...]:
    """A command that prints lines, as ``tegrastats`` does, until it is terminated."""
    return ("sh", "-c", f"printf '%s\\n' {' '.join(map(shlex.quote, lines))}; exec sleep 60")


def test_a_process_is_read_in_the_background() -> None:
    counter = TegrastatsCounter.started(printing(ORIN_NANO))
    try:
        first = counter.joules()
        assert counter.joules() > first >= 0
        assert conditions("cuda", counter).gpu_mhz == 305
        assert conditions("cpu", counter).celsius == 49.625
    finally:
        counter.close()


def test_a_process_without_power_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dyexport.bench.tegrastats.FIRST_LINE", 0.2)
    with pytest.raises(Unavailable, match="reports no power rails"):
        TegrastatsCounter.started((sys.executable, "-c", ""))


def write_zone(root: Path, name: str, energy: int, full: int = 1000) -> Path:
    zone = root / name
    zone.mkdir(parents=True, exist_ok=True)
    (zone / "energy_uj").write_text(f"{energy}\n")
    (zone / "max_energy_range_uj").write_text(f"{full}\n")
    return zone


def test_rapl_counts_on_after_its_counter_wraps(tmp_path: Path) -> None:
    zone = write_zone(tmp_path, "intel-rapl:0", 700)
    counter = RaplCounter.open(tmp_path)
    found = []
    for reading in (900, 100, 100, 600, 50):  # two wraps, and one reading without a change
        (zone / "energy_uj").write_text(str(reading))
        found.append(round(counter.joules() * 1e6))
    assert found == [200, 400, 400, 900, 1350]


def test_rapl_adds_packages_and_not_their_parts(tmp_path: Path) -> None:
    zones = [write_zone(tmp_path, name, 0) for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0", "other")]
    counter = RaplCounter.open(tmp_path)
    for zone in zones:
        (zone / "energy_uj").write_text("5")
    assert counter.joules() * 1e6 == pytest.approx(10)


def test_rapl_that_is_absent_or_closed_to_users_says_so(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no RAPL counters"):
        RaplCounter.open(tmp_path)
    zone = write_zone(tmp_path, "intel-rapl:0", 0)
    (zone / "energy_uj").unlink()
    with pytest.raises(Unavailable, match="energy_uj cannot be read"):
        RaplCounter.open(tmp_path)


class NVMLError(Exception):
    """The base of what ``pynvml`` raises."""


class RecordedNvml:
    """The functions of ``pynvml`` that are used, which answer from a recording."""

    NVMLError = NVMLError
    NVML_TEMPERATURE_GPU, NVML_CLOCK_SM, NVML_CLOCK_MEM = 0, 1, 2

    def __init__(self, millijoules: list[int], processes: dict[int, int | None] | None = None) -> None:
        self.millijoules = iter(millijoules)
        self.processes = processes or {}

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int:
        try:
            return next(self.millijoules)
        except StopIteration:
            raise NVMLError("Not Supported") from None

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.processes.items()]

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int) -> int:
        return {self.NVML_TEMPERATURE_GPU: 61}[sensor]

    def nvmlDeviceGetClockInfo(self, handle: Any, clock: int) -> int:
        return {self.NVML_CLOCK_SM: 1980, self.NVML_CLOCK_MEM: 2619}[clock]


def ticks(step: float) -> Iterator[float]:
    now = 0.0
    while True:
        yield now
        now += step


def test_energy_is_divided_by_the_calls() -> None:
    clock = ticks(0.5)  # each look at the clock takes half a second: three calls within 2 s
    calls: list[int] = []
    meter = Meter(counter=Gpu(RecordedNvml([1_000_000, 1_009_000]), handle=None))
    energy = meter.per_call(lambda: calls.append(1), lambda: next(clock), least_seconds=2.0)
    assert len(calls) == 3
    assert energy == Energy(joules=pytest.approx(3.0), source="NVML total energy")
    assert energy.scaled(1 / 2).joules == pytest.approx(1.5)


def test_without_a_counter_nothing_is_repeated() -> None:
    energy = Meter(counter=None, reason="no counter").per_call(lambda: pytest.fail("it was called"), lambda: 0.0)
    assert energy == Energy(joules=None, reason="no counter")
    assert energy.scaled(0.5).reason == "no counter"


def test_a_gpu_without_a_counter_has_a_reason() -> None:
    meter = Meter(counter=Gpu(RecordedNvml([]), handle=None))
    energy = meter.per_call(lambda: None, lambda: 0.0)
    assert energy.joules is None
    assert energy.reason == "NVML does not report the energy of this GPU: Not Supported"


def test_memory_of_this_process_on_a_gpu() -> None:
    assert Gpu(RecordedNvml([], {os.getpid(): 3 << 30, 1: 5}), None).process_bytes() == 3 << 30
    for processes in ({1: 5}, {os.getpid(): None}):
        with pytest.raises(Unavailable, match="memory of this process"):
            Gpu(RecordedNvml([], processes), None).process_bytes()


def test_temperature_and_clocks_of_a_gpu() -> None:
    gpu = Gpu(RecordedNvml([]), None)
    assert (gpu.celsius(), gpu.clock_mhz(), gpu.memory_clock_mhz()) == (61, 1980, 2619)


def test_a_machine_has_a_counter_or_a_reason() -> None:
    counter, reason = find_counter("cpu")
    assert (counter is None) != (reason is None)
    if counter is None:
        assert str(reason).startswith("no counter on this machine: ")
    else:
        counter.close()


def test_a_clock_that_falls_is_a_warning() -> None:
    before = Conditions(celsius=60, gpu_mhz=1980, memory_mhz=2619, cpu_mhz=None)
    assert throttling(before, Conditions(celsius=88, gpu_mhz=1500, memory_mhz=2500, cpu_mhz=3000)) == [
        "the GPU clock fell from 1980 to 1500 MHz while timing"
    ]
    assert throttling(before, Conditions()) == []
