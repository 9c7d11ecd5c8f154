"""What a report says about the machine."""

from __future__ import annotations

from pathlib import Path

import torch

from dyexport.bench.environment import cpu_model, describe


def test_the_cpu_is_named(tmp_path: Path) -> None:
    cpuinfo, board = tmp_path / "cpuinfo", tmp_path / "model"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: AMD EPYC 9654\nprocessor\t: 1\nmodel name\t: AMD EPYC 9654\n")
    assert cpu_model(cpuinfo, board) == "AMD EPYC 9654"
    board.write_bytes(b"NVIDIA Jetson AGX Orin Developer Kit\0")
    assert cpu_model(cpuinfo, board) == "NVIDIA Jetson AGX Orin Developer Kit"


def test_a_machine_without_either_file_has_some_name(tmp_path: Path) -> None:
    assert cpu_model(tmp_path / "none", tmp_path / "none either")


def test_versions_are_those_that_are_installed() -> None:
    found = describe("cpu", threads=3)
    assert found.versions["torch"] == torch.__version__
    assert (found.device, found.threads, found.driver) == ("cpu", 3, None)
    assert found.device_name == found.cpu
