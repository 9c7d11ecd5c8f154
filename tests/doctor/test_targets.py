"""Verdicts on targets: what is missing and how to install it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from dyexport.doctor.targets import CHECKS, Machine, Verdict, judge, judge_all
from dyexport.engines.registry import BACKENDS
from tests.doctor.machines import ORIN_JETPACK_6, ORIN_JETPACK_7, machine, write, write_board

without_tensorrt = pytest.mark.skipif(find_spec("tensorrt") is not None, reason="TensorRT is installed")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
PACKAGES = {
    "onnx-rtx": (
        "onnxruntime_ep_nv_tensorrt_rtx",
        "ONNX Runtime's TensorRT-RTX provider",
        "pip install 'dyexport[rtx]'",
    ),
    "tensorrt": ("tensorrt", "TensorRT", "pip install 'dyexport[tensorrt]'"),
    "tensorrt-rtx": ("tensorrt_rtx_bindings", "TensorRT-RTX", "pip install 'dyexport[rtx]'"),
    "torch-tensorrt": ("torch_tensorrt", "Torch-TensorRT", "pip install 'dyexport[torch-tensorrt]'"),
}
"""Module, name and command of the package that a target needs besides a GPU."""


def needs(verdict: Verdict) -> dict[str, str | None]:
    return {need.what: need.install for need in verdict.needs}


def test_every_target_is_judged(tmp_path: Path) -> None:
    assert set(BACKENDS) <= set(CHECKS)
    assert [verdict.target for verdict in judge_all(machine(tmp_path))] == list(BACKENDS)


def test_a_machine_without_a_gpu(tmp_path: Path) -> None:
    verdicts = {target: judge(target, machine(tmp_path)) for target in CHECKS}
    assert {target for target, verdict in verdicts.items() if verdict.device is not None} == {"onnx", "torch"}
    assert needs(verdicts["onnx"]) == {}
    for target, (module, package, command) in PACKAGES.items():
        absent = {package: command} if find_spec(module) is None else {}
        assert needs(verdicts[target]) == {"an NVIDIA GPU": None, **absent}
    assert {target for target, verdict in verdicts.items() if verdict.compiles} == {
        "torch",
        *(["tensorrt-rtx"] if find_spec("tensorrt_rtx_bindings") else []),
    }


def test_hardware_without_a_driver(tmp_path: Path) -> None:
    write(tmp_path, "sys/bus/pci/devices/0000:01:00.0/vendor", b"0x10de\n")
    write(tmp_path, "sys/bus/pci/devices/0000:01:00.0/class", b"0x030000\n")
    found = needs(judge("tensorrt-rtx", machine(tmp_path)))
    assert found["NVIDIA's driver"] == "sudo ubuntu-drivers install"
    assert "an NVIDIA GPU" not in found


def test_torch_for_the_cpu_next_to_a_driver(tmp_path: Path) -> None:
    write(tmp_path, "proc/driver/nvidia/version", b"NVRM version: NVIDIA UNIX x86_64 Kernel Module  575.57.08  x\n")
    found = needs(judge("tensorrt-rtx", machine(tmp_path)))["torch with CUDA"]
    plain = torch.__version__.partition("+")[0]
    assert found == f"pip install --force-reinstall --no-deps torch=={plain}"


def test_onnxruntime_for_the_cpu_next_to_a_gpu(tmp_path: Path) -> None:
    verdict = judge("onnx", machine(tmp_path, "8.9"))
    assert verdict.device == "cpu"
    assert needs(verdict) == {"ONNX Runtime with CUDA": "pip uninstall -y onnxruntime && pip install 'dyexport[gpu]'"}
    providers = ("CUDAExecutionProvider", "CPUExecutionProvider")
    verdict = judge("onnx", machine(tmp_path, "8.9", providers=providers))
    assert (verdict.device, needs(verdict)) == ("cuda", {})


@without_tensorrt
@pytest.mark.parametrize(
    ("release", "command"),
    [
        (ORIN_JETPACK_7, "sudo apt-get install nvidia-jetpack && python3 -m venv --system-site-packages .venv"),
        (ORIN_JETPACK_6, None),
        (None, "pip install 'dyexport[tensorrt]'"),
    ],
)
def test_where_tensorrt_comes_from(release: str | None, command: str | None, tmp_path: Path) -> None:
    if release is None:
        write(tmp_path, "proc/driver/nvidia/version", b"NVRM version: NVIDIA UNIX x86_64 Kernel Module  575.57.08  x\n")
    else:
        write_board(tmp_path, release)
    verdict = judge("tensorrt", machine(tmp_path, "8.7"))
    assert verdict.device is None
    assert list(needs(verdict).values()) == [command]


@without_gpu
@pytest.mark.tensorrt
@pytest.mark.parametrize("capability", ["9.0", "8.7", "11.0"])
def test_rtx_plans_on_a_gpu_that_their_builder_does_not_know(capability: str, rtx: Any, tmp_path: Path) -> None:
    verdict = judge("tensorrt-rtx", machine(tmp_path, capability))
    assert verdict.device is None
    (what,) = needs(verdict)
    assert f"compute capability {capability}" in what
    assert judge("tensorrt-rtx", machine(tmp_path, "8.9")).device == "cuda"


def test_jetpack_6_is_too_old_for_torch(tmp_path: Path) -> None:
    write_board(tmp_path, ORIN_JETPACK_6)
    write(
        tmp_path,
        "proc/driver/nvidia/version",
        b"NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  x\n",
    )
    for target in ("onnx-rtx", "tensorrt-rtx"):
        assert [need.what.partition(":")[0] for need in judge(target, machine(tmp_path)).needs] == ["JetPack 7.2"]
    write_board(tmp_path, ORIN_JETPACK_7)
    (need,) = judge("tensorrt-rtx", machine(tmp_path)).needs
    assert "--force-reinstall" in str(need.install)


def test_kernels_that_torch_lacks(tmp_path: Path) -> None:
    """PyPI's torch for aarch64 has none for Orin."""
    kernels = ("8.0", "9.0", "10.0", "11.0", "12.0")
    orin, thor = (judge("torch", machine(tmp_path, each, kernels=kernels)) for each in ("8.7", "11.0"))
    assert (orin.device, thor.device) == ("cuda", "cuda")
    assert [need.what for need in orin.needs if "kernels" in need.what] == [
        "torch with kernels for 8.7; this one has them for 8.0, 9.0, 10.0, 11.0, 12.0"
    ]
    assert not any("kernels" in need.what for need in thor.needs)


def test_a_compiler_is_needed_to_compile_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    described: Machine = machine(tmp_path)
    verdict = judge("torch", described)
    assert (verdict.device, verdict.compiles) == ("cpu", False)
    assert list(needs(verdict).values()) == ["sudo apt-get install g++"]
