"""Bundles that several tests read."""

from __future__ import annotations

import pytest

from dyexport.bundle import Bundle
from tests.build.tiny import build, tiny_settings

VARIANTS = {"masked": 16, "compact": 4, "capacity": 1, "dynamic": 2}  # token path: engines


@pytest.fixture(scope="module", params=VARIANTS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """One bundle for each token path, each with another number of engines."""
    path: str = request.param
    return build(tiny_settings(tmp_path_factory.mktemp(path), token_path=path, engines=VARIANTS[path]))
