"""A small bundle that many tests read: built by the first that asks, for every test process."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from dyexport.bundle.reader import Bundle


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def sit_tiny(shared_folder: Path) -> Bundle:
    """``sit-tiny`` in three engines and the dense network, with random weights. Not to be written to."""
    from tests.pipeline.tiny import build, tiny_settings  # here, for it imports torch

    with (shared_folder / "sit-tiny.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build(tiny_settings(shared_folder / "sit-tiny", engines=3, baseline=True))
