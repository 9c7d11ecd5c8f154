"""Small bundles that many tests read: built by the first that asks, for every test process."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dyexport.bundle.reader import MANIFEST, Bundle


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Create ``folder`` and keep other processes of this run out of it."""
    folder.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def built_once(folder: Path, **settings: Any) -> Bundle:
    """Open ``bundle`` in ``folder``, and build it where that has not been done. It is not to be written to."""
    from tests.pipeline.tiny import build, tiny_settings  # here, because they import torch

    with in_turn(folder):
        if (folder / "bundle" / MANIFEST).exists():
            return Bundle.open(folder / "bundle")
        return build(tiny_settings(folder, **settings))


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def sit_tiny(shared_folder: Path) -> Bundle:
    """``sit-tiny`` in three engines and the dense network, with random weights."""
    return built_once(shared_folder / "sit-tiny", engines=3, baseline=True)


@pytest.fixture(scope="session")
def dit_tiny(shared_folder: Path) -> Bundle:
    """A small DiT in two engines, with random weights."""
    from tests.factories import tiny_preset  # here, because it imports torch

    return built_once(shared_folder / "dit-tiny", model=tiny_preset("dit"), engines=2)


@pytest.fixture(scope="session")
def sit_tiny_torch(sit_tiny: Bundle, shared_folder: Path) -> Bundle:
    """``sit_tiny``, copied and compiled for ``torch``: three segments, their conditioning and the dense network."""
    folder = shared_folder / "sit-tiny-torch"
    with in_turn(folder):
        if not (folder / "compiled").exists():
            shutil.copytree(sit_tiny.root, folder / "bundle")
            from dyexport.compilation.api import compile_engines  # here, because it imports torch

            compile_engines(folder / "bundle", "torch")
            (folder / "compiled").touch()
    return Bundle.open(folder / "bundle")


@pytest.fixture(scope="session")
def flux_tiny(shared_folder: Path) -> Bundle:
    """``flux-tiny`` in two engines and the dense network, with random weights."""
    return built_once(shared_folder / "flux-tiny", model="flux-tiny", engines=2, baseline=True)


@pytest.fixture(scope="session")
def latte_tiny(shared_folder: Path) -> Bundle:
    """``latte-tiny`` in two engines and the dense network, with random weights."""
    return built_once(shared_folder / "latte-tiny", model="latte-tiny", engines=2, baseline=True)


@pytest.fixture(scope="session")
def qwen_image_tiny(shared_folder: Path) -> Bundle:
    """``qwen-image-tiny`` in two engines, with random weights."""
    return built_once(shared_folder / "qwen-image-tiny", model="qwen-image-tiny", engines=2)
