from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.factories import tiny_preset
from tests.pipeline.tiny import build, tiny_settings
from tests.pipeline.tiny_pipeline import (
    save_dit_pipeline,
    save_latte_pipeline,
    save_pipeline,
    save_qwen_image_pipeline,
)
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


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A built bundle, and a saved pipeline of the same sizes with a stock transformer."""

    bundle: Path
    pipeline: Path


@pytest.fixture(scope="session")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    preset = tiny_preset("dit")
    root = tmp_path_factory.mktemp("dit")
    bundle = build(tiny_settings(root, model=preset, engines=2)).root
    return Saved(bundle=bundle, pipeline=save_dit_pipeline(root / "pipeline", preset))


@pytest.fixture(scope="session")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    root = tmp_path_factory.mktemp("flux")
    bundle = build(tiny_settings(root, model="flux-tiny", engines=2)).root
    return Saved(bundle=bundle, pipeline=save_pipeline(root / "pipeline"))


@pytest.fixture(scope="session")
def latte(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    root = tmp_path_factory.mktemp("latte")
    bundle = build(tiny_settings(root, model="latte-tiny", engines=2)).root
    return Saved(bundle=bundle, pipeline=save_latte_pipeline(root / "pipeline"))


@pytest.fixture(scope="session")
def qwenimage(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    root = tmp_path_factory.mktemp("qwen-image")
    bundle = build(tiny_settings(root, model="qwen-image-tiny", engines=2)).root
    return Saved(bundle=bundle, pipeline=save_qwen_image_pipeline(root / "pipeline"))
