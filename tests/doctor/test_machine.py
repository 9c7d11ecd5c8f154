"""Facts about machines: recorded system files of boards and drivers, and this machine."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
import torch

from dyexport.doctor.jetson import Jetson, find_jetson, parse_release
from dyexport.doctor.machine import find_accelerators, find_host
from dyexport.doctor.probing import Findings
from tests.doctor.machines import ORIN_JETPACK_6, ORIN_JETPACK_7, THOR, XAVIER_NX, write, write_board

THOR_MODEL = b"NVIDIA Jetson AGX Thor Developer Kit\0"


@pytest.mark.parametrize(
    ("release", "l4t", "jetpack", "major"),
    [
        (ORIN_JETPACK_6, "36.4.7", "6.1 to 6.2.1", 36),
        (ORIN_JETPACK_7, "39.2.0", "7.2", 39),
        (THOR, "38.2.2", "7.0", 38),
        (XAVIER_NX, "32.7.2", None, 32),
    ],
)
def test_release_of_a_board(release: str, l4t: str, jetpack: str | None, major: int, tmp_path: Path) -> None:
    write_board(tmp_path, release, THOR_MODEL)
    found = find_jetson(tmp_path)
    assert found == Jetson(board="NVIDIA Jetson AGX Thor Developer Kit", l4t=l4t, jetpack=jetpack)
    assert found.major == major


def test_a_board_without_a_device_tree(tmp_path: Path) -> None:
    write(tmp_path, "etc/nv_tegra_release", THOR.encode())
    found = find_jetson(tmp_path)
    assert found is not None
    assert found.board is None


def test_other_machines_are_no_jetson(tmp_path: Path) -> None:
    assert find_jetson(tmp_path) is None


def test_an_unknown_format_is_a_finding_and_the_rest_is_collected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names no release"):
        parse_release("R39.2.0")
    write_board(tmp_path, "R39.2.0")
    findings = Findings()
    host = find_host(findings, tmp_path)
    assert host.jetson is None
    assert host.memory == psutil.virtual_memory().total
    assert list(findings.problems) == ["jetson"]
    assert "'R39.2.0'" in findings.problems["jetson"]


@pytest.mark.parametrize(
    ("text", "driver"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n", "535.183.01"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.57.08  Release Build\n", "575.57.08"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  Tempbuild\n",
            "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  Tempbuild",
        ),
    ],
)
def test_version_of_the_driver(text: str, driver: str, tmp_path: Path) -> None:
    write(tmp_path, "proc/driver/nvidia/version", f"{text}GCC version: 12.3.0\n".encode())
    assert find_host(Findings(), tmp_path).driver == driver


@pytest.mark.parametrize(
    ("vendor", "kind", "found"),
    [
        ("0x10de", "0x030000", True),
        ("0x10de", "0x030200", True),
        ("0x10de", "0x0c0330", False),
        ("0x1002", "0x030000", False),
    ],
)
def test_hardware_without_a_driver(vendor: str, kind: str, found: bool, tmp_path: Path) -> None:
    """A display or 3D controller counts, the USB controller of the same card does not."""
    write(tmp_path, "sys/bus/pci/devices/0000:00:02.0/vendor", b"0x8086\n")
    write(tmp_path, "sys/bus/pci/devices/0000:00:02.0/class", b"0x030000\n")
    write(tmp_path, "sys/bus/pci/devices/0000:01:00.0/vendor", f"{vendor}\n".encode())
    write(tmp_path, "sys/bus/pci/devices/0000:01:00.0/class", f"{kind}\n".encode())
    host = find_host(Findings(), tmp_path)
    assert host.nvidia_hardware is found
    assert host.driver is None


def test_arm_names_no_cpu_model(tmp_path: Path) -> None:
    write_board(tmp_path, THOR)
    findings = Findings()
    assert find_host(findings, tmp_path).cpu
    assert findings.problems == {}


def test_this_machine() -> None:
    findings = Findings()
    host, accelerators = find_host(findings), find_accelerators(findings)
    assert findings.problems == {}
    assert host.cores == len(os.sched_getaffinity(0))
    assert host.memory is not None
    assert host.free_memory is not None
    assert 0 < host.free_memory < host.memory
    assert host.packages["torch"] == torch.__version__
    assert accelerators.cpu_capability == torch.backends.cpu.get_cpu_capability()
    assert accelerators.cuda == torch.version.cuda
    assert len(accelerators.gpus) == torch.cuda.device_count()
