from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.bundles import TinyBundle, write_bundle


@pytest.fixture(scope="session")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    return write_bundle(tmp_path_factory.mktemp("ddpm") / "bundle")


@pytest.fixture(scope="session")
def flow(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    return write_bundle(tmp_path_factory.mktemp("flow") / "bundle", objective="flow")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Where a test writes a bundle of its own."""
    return tmp_path / "bundle"
