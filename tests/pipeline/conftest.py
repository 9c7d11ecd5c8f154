"""Bundles that several tests read."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from dyexport.bundle.reader import Bundle
from dyexport.errors import StorageError
from dyexport.pipeline.settings import BuildSettings
from tests.pipeline.tiny import build, tiny_settings

VARIANTS = {"masked": 3, "compact": 4, "capacity": 1, "dynamic": 2}  # token path: engines


@pytest.fixture(scope="module", params=VARIANTS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """One bundle for each token path, each with another number of engines; built by one test process for all."""
    path: str = request.param
    base = tmp_path_factory.getbasetemp()
    shared: Path = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return build_in_turn(tiny_settings(shared / f"shared-{path}", token_path=path, engines=VARIANTS[path]))


def build_in_turn(settings: BuildSettings) -> Bundle:
    """Build, or wait for the process that is building and find everything done."""
    while True:
        try:
            return build(settings)
        except StorageError as error:
            if "another build" not in str(error):
                raise
            time.sleep(0.5)
