"""Bundles that the tests of compilation copy."""

from __future__ import annotations

from pathlib import Path

import pytest

from dyexport.bundle.reader import Bundle
from tests.built import built_once


@pytest.fixture(scope="session")
def static_tokens(shared_folder: Path) -> Bundle:
    """``sit-tiny`` in three engines that TensorRT-RTX can be built from, so four networks; with random weights."""
    return built_once(shared_folder / "static-tokens", engines=3, token_path="dynamic")


@pytest.fixture
def root(static_tokens: Bundle, tmp_path: Path) -> Path:
    """A copy of that bundle, away from its work directory."""
    from tests.compilation.bundles import copy_of

    return copy_of(static_tokens, tmp_path / "machine")
