"""What every test may count on: no network, one thread, the same random numbers each time."""

from __future__ import annotations

import gc
import os
import random
import sys
import tempfile
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
_CACHE = tempfile.TemporaryDirectory(prefix="dyexport-")  # not the user's
os.environ["DYEXPORT_CACHE"] = _CACHE.name
# Tests run in two processes, and their tensors are small: more threads only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["tests.built", "tests.lanes"]

settings.register_profile("dyexport", deadline=None)
settings.load_profile("dyexport")


def pytest_collection_finish() -> None:
    """Leave what is imported out of garbage collection, which would go through half a million objects each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:  # tests that need no torch do not wait for it
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def rtx() -> Any:
    """TensorRT-RTX's module; skips the test where it is not installed."""
    from dyexport.errors import MissingDependencyError
    from dyexport.tensorrt_api import load_api

    try:
        return load_api("tensorrt-rtx").trt
    except MissingDependencyError as error:
        pytest.skip(str(error))
