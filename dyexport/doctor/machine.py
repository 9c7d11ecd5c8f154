"""Facts about this machine. Those of ``find_host`` need no torch."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import psutil

from dyexport.doctor.jetson import Jetson, find_jetson
from dyexport.doctor.probing import Findings

PACKAGES = (
    "torch",
    "diffusers",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-ep-nv-tensorrt-rtx-cu13",
    "tensorrt-rtx-cu13-bindings",
    "tensorrt",
    "torch-tensorrt",
)
NVIDIA, DISPLAY = "0x10de", "0x03"  # vendor and class of PCI devices
DRIVER = re.compile(r"NVRM version:.*?(\d+\.\d+(?:\.\d+)?)")


@dataclass(frozen=True, kw_only=True)
class Host:
    """Facts that need no torch. Sizes in bytes; None where unknown or absent.

    ``cores`` are those that this process may use. ``nvidia_hardware`` is True for a display controller of NVIDIA's on
    the PCI bus, with or without a driver. ``packages`` are installed versions by their names on the index.
    """

    system: str
    python: str
    cpu: str | None
    cores: int | None
    memory: int | None
    free_memory: int | None
    jetson: Jetson | None
    nvidia_hardware: bool
    driver: str | None
    compiler: str | None
    packages: dict[str, str | None]


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A CUDA device as torch sees it. Sizes in bytes; ``free_memory`` is None where the device does not answer."""

    name: str
    compute_capability: str
    memory: int
    free_memory: int | None


@dataclass(frozen=True, kw_only=True)
class Accelerators:
    """Facts that torch and ONNX Runtime know. ``cuda`` is the version that torch was built for.

    ``kernels`` are the compute capabilities that torch has kernels for. ``providers`` are ONNX Runtime's; None where it
    cannot be imported.
    """

    cpu_capability: str | None
    cuda: str | None
    kernels: tuple[str, ...]
    gpus: tuple[Gpu, ...]
    providers: tuple[str, ...] | None


def find_host(findings: Findings, root: Path = Path("/")) -> Host:
    """Collect the facts, reading system files below ``root``."""
    take = findings.attempt
    memory = take("memory", psutil.virtual_memory)
    return Host(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        cpu=take("cpu", partial(_cpu_model, root)),
        cores=take("cores", lambda: len(os.sched_getaffinity(0))),
        memory=None if memory is None else memory.total,
        free_memory=None if memory is None else memory.available,
        jetson=take("jetson", partial(find_jetson, root)),
        nvidia_hardware=take("pci", partial(_has_nvidia, root)) or False,
        driver=take("driver", partial(_driver, root)),
        compiler=take("g++", _compiler),
        packages={name: take(name, partial(_version, name)) for name in PACKAGES},
    )


def find_accelerators(findings: Findings) -> Accelerators:
    """Import torch and ONNX Runtime and ask them."""
    take = findings.attempt
    return Accelerators(
        cpu_capability=take("torch", _cpu_capability),
        cuda=take("torch", _cuda_of_torch),
        kernels=take("torch", _kernels) or (),
        gpus=take("gpu", partial(_gpus, findings)) or (),
        providers=take("onnxruntime", _providers),
    )


def _cpu_model(root: Path) -> str | None:
    """Return the model's name; Arm's /proc/cpuinfo has none, so that of the board or the architecture stands in."""
    text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine() or None


def _has_nvidia(root: Path) -> bool:
    return any(
        (device / "vendor").read_text().strip() == NVIDIA and (device / "class").read_text().startswith(DISPLAY)
        for device in (root / "sys/bus/pci/devices").glob("*")
    )


def _driver(root: Path) -> str | None:
    """Return the version of NVIDIA's kernel driver; None without one."""
    path = root / "proc/driver/nvidia/version"
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    found = DRIVER.search(text)
    return found[1] if found else text.partition("\n")[0]


def _compiler() -> str | None:
    """Return the first line that g++ prints about itself; AOTInductor compiles with it."""
    if (path := shutil.which("g++")) is None:
        return None
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.partition("\n")[0]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_capability() -> str:
    import torch

    return torch.backends.cpu.get_cpu_capability()


def _cuda_of_torch() -> str | None:
    import torch

    return torch.version.cuda


def _kernels() -> tuple[str, ...]:
    """Return ``8.6`` for ``sm_86`` and ``9.0`` for ``sm_90a``; empty where torch sees no GPU."""
    import torch

    found = (re.fullmatch(r"sm_(\d+)(\d)[a-z]?", name) for name in torch.cuda.get_arch_list())
    return tuple(f"{match[1]}.{match[2]}" for match in found if match)


def _gpus(findings: Findings) -> tuple[Gpu, ...]:
    import torch

    if not torch.cuda.is_available():
        return ()
    return tuple(_gpu(findings, index) for index in range(torch.cuda.device_count()))


def _gpu(findings: Findings, index: int) -> Gpu:
    import torch

    device = torch.cuda.get_device_properties(index)
    free = findings.attempt(f"memory of cuda:{index}", lambda: torch.cuda.mem_get_info(index)[0])
    return Gpu(
        name=device.name,
        compute_capability=f"{device.major}.{device.minor}",
        memory=device.total_memory,
        free_memory=free,
    )


def _providers() -> tuple[str, ...] | None:
    """Return None where ONNX Runtime is absent; raises what a broken one raises."""
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    return tuple(onnxruntime.get_available_providers())
