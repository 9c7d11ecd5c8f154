"""Engines that several modules test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.built import in_turn
from tests.engines.tiny import make_weights, whole_segment
from tests.engines.tiny_torch import build_tiny_package, package_of


@pytest.fixture(scope="session")
def tiny_package(shared_folder: Path) -> Path:
    """The package of the tiny network, compiled by the first test that asks. It is not to be written to."""
    folder = shared_folder / "tiny-package"
    with in_turn(folder):
        if not package_of(folder).exists():
            build_tiny_package(folder, make_weights(), whole_segment(gated=False))
    return package_of(folder)
