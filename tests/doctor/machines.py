"""Machines as the files of real ones describe them."""

from __future__ import annotations

from pathlib import Path

from dyexport.doctor.machine import Accelerators, Gpu, Host, find_host
from dyexport.doctor.probing import Findings
from dyexport.doctor.targets import Machine

ORIN_JETPACK_6 = """\
# R36 (release), REVISION: 4.7, GCID: 42132812, BOARD: generic, EABI: aarch64, DATE: Thu Sep 18 22:54:44 UTC 2025
# KERNEL_VARIANT: oot
TARGET_USERSPACE_LIB_DIR=nvidia
TARGET_USERSPACE_LIB_DIR_PATH=usr/lib/aarch64-linux-gnu/nvidia
"""
ORIN_JETPACK_7 = """\
# R39 (release), REVISION: 2.0, GCID: 45755727, BOARD: generic, EABI: aarch64, DATE: Mon Jun  1 09:28:48 PM UTC 2026
# KERNEL_VARIANT: oot
TARGET_USERSPACE_LIB_DIR=nvidia
TARGET_USERSPACE_LIB_DIR_PATH=usr/lib/aarch64-linux-gnu/nvidia
"""
THOR = """\
# R38 (release), REVISION: 2.2, GCID: 42205042, BOARD: generic, EABI: aarch64, DATE: Thu Sep 25 22:47:11 UTC 2025
# KERNEL_VARIANT: oot
TARGET_USERSPACE_LIB_DIR=nvidia
TARGET_USERSPACE_LIB_DIR_PATH=usr/lib/aarch64-linux-gnu/nvidia
INSTALL_TYPE=
"""
XAVIER_NX = """\
# R32 (release), REVISION: 7.2, GCID: 30192233, BOARD: t186ref, EABI: aarch64, DATE: Sun Apr 17 09:53:50 UTC 2022
"""
ORIN_MODEL = b"NVIDIA Jetson AGX Orin Developer Kit\0"
ARM_CPUINFO = "processor\t: 0\nBogoMIPS\t: 62.50\nCPU implementer\t: 0x41\nCPU part\t: 0xd42\n"


def write_board(root: Path, release: str, model: bytes = ORIN_MODEL) -> None:
    write(root, "etc/nv_tegra_release", release.encode())
    write(root, "proc/device-tree/model", model)
    write(root, "proc/cpuinfo", ARM_CPUINFO.encode())


def write(root: Path, name: str, contents: bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents)


def host(root: Path) -> Host:
    """This machine's packages and memory with the system files below ``root``."""
    return find_host(Findings(), root)


def machine(
    root: Path,
    *gpus: str,
    providers: tuple[str, ...] = ("CPUExecutionProvider",),
    kernels: tuple[str, ...] = (),
) -> Machine:
    """A machine with GPUs of these compute capabilities, and torch with kernels for those."""
    found = tuple(
        Gpu(name="a GPU", compute_capability=each, memory=64 * 2**30, free_memory=60 * 2**30) for each in gpus
    )
    cuda = "13.0" if gpus else None
    return Machine(
        host=host(root),
        accelerators=Accelerators(
            cpu_capability="DEFAULT", cuda=cuda, kernels=kernels, gpus=found, providers=providers
        ),
    )
