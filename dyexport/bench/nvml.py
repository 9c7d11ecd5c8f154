"""Energy, memory, temperature and clocks of one NVIDIA GPU, as its driver reports them. Untested on a GPU."""

from __future__ import annotations

import os
from typing import Any

from dyexport.bench.unavailable import Unavailable
from dyexport.errors import MissingDependencyError


class Gpu:
    """A GPU by its handle in NVML. ``nvml`` is the module ``pynvml``."""

    source = "NVML total energy"

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle

    @classmethod
    def open(cls, device: str) -> Gpu:
        """Open ``cuda`` or ``cuda:N`` as torch counts it. Raises ``Unavailable``."""
        try:
            import pynvml
        except ModuleNotFoundError as error:
            raise Unavailable(str(MissingDependencyError("nvidia-ml-py", "bench"))) from error
        import torch

        try:
            pynvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(device).uuid  # CUDA_VISIBLE_DEVICES changes the order, not the UUID
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
        except pynvml.NVMLError as error:
            raise Unavailable(f"NVML does not answer: {error}") from error

    def _read(self, what: str, function: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, function)(self._handle, *arguments)
        except self._nvml.NVMLError as error:
            raise Unavailable(f"NVML does not report the {what} of this GPU: {error}") from error

    @property
    def name(self) -> str:
        return str(self._read("name", "nvmlDeviceGetName"))

    @property
    def driver(self) -> str:
        return str(self._nvml.nvmlSystemGetDriverVersion())

    def joules(self) -> float:
        """Return the energy since the driver was loaded; NVML counts millijoules, from Volta on."""
        return float(self._read("energy", "nvmlDeviceGetTotalEnergyConsumption")) / 1e3

    def process_bytes(self) -> int:
        """Return the memory of this process on the GPU, whichever library allocated it."""
        processes = self._read("memory by process", "nvmlDeviceGetComputeRunningProcesses")
        used = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
        if not used or None in used:
            raise Unavailable("NVML does not report the memory of this process, as in a container with its own PIDs")
        return int(sum(used))

    def celsius(self) -> float:
        return float(self._read("temperature", "nvmlDeviceGetTemperature", self._nvml.NVML_TEMPERATURE_GPU))

    def clock_mhz(self) -> int:
        """Return the clock of the streaming multiprocessors."""
        return int(self._read("clock", "nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM))

    def memory_clock_mhz(self) -> int:
        return int(self._read("memory clock", "nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_MEM))

    def close(self) -> None:
        self._nvml.nvmlShutdown()
