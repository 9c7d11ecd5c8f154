"""Compiled kernels on disk: what is loaded, when the file is written, and that none is needed.

TensorRT-RTX makes its runtime cache from an engine on a GPU; here another object has its two methods.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from dyexport.engines.tensorrt_kernels import KernelCache, kernel_file


class Kernels:
    """Serializes to what it holds, and accepts what starts with its GPU."""

    def __init__(self, gpu: bytes = b"a") -> None:
        self.gpu = gpu
        self.held = gpu

    def deserialize(self, content: bytes) -> bool:
        if accepted := content.startswith(self.gpu):
            self.held = content
        return accepted

    def serialize(self) -> memoryview:
        return memoryview(self.held)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kernels" / "plan"


def test_the_next_process_starts_with_the_kernels_of_the_last(path: Path) -> None:
    first = Kernels()
    cache = KernelCache(first, path)
    assert not path.exists()
    first.held = b"a: kernel"
    cache.save()
    second = Kernels()
    KernelCache(second, path)
    assert second.held == b"a: kernel"


def test_nothing_new_is_not_written(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"a: kernel")
    kernels = Kernels()
    cache = KernelCache(kernels, path)
    path.unlink()
    cache.save()
    assert not path.exists()
    kernels.held = b"a: kernel, another"
    cache.save()
    assert path.read_bytes() == b"a: kernel, another"


def test_kernels_of_another_gpu_are_replaced(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"b: kernel")
    kernels = Kernels(b"a")
    cache = KernelCache(kernels, path)
    assert kernels.held == b"a"
    cache.save()
    assert path.read_bytes() == b"a"


def test_a_run_does_not_fail_for_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = KernelCache(Kernels(), tmp_path / "file" / "plan")
    with pytest.warns(UserWarning, match="compiled kernels are not kept for the next start: cannot write"):
        cache.save()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.save()


def test_kernels_are_of_one_plan_version_and_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYEXPORT_CACHE", str(tmp_path))
    file = kernel_file("plan", "1.7", "RTX 4090")
    assert file.is_relative_to(tmp_path)
    assert file == kernel_file("plan", "1.7", "RTX 4090")
    others = {("other", "1.7", "RTX 4090"), ("plan", "1.8", "RTX 4090"), ("plan", "1.7", "RTX 5090")}
    assert len({file, *(kernel_file(*each) for each in others)}) == 4
