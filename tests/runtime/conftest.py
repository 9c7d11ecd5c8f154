from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from dyexport.bundle.reader import Bundle
from tests.built import built_once
from tests.factories import tiny_preset
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
def dit(shared_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    preset = tiny_preset("dit")
    bundle = built_once(shared_folder / "dit-tiny", model=preset, engines=2).root
    return Saved(bundle=bundle, pipeline=save_dit_pipeline(tmp_path_factory.mktemp("dit") / "pipeline", preset))


@pytest.fixture(scope="session")
def flux(flux_tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(bundle=flux_tiny.root, pipeline=save_pipeline(tmp_path_factory.mktemp("flux") / "pipeline"))


@pytest.fixture(scope="session")
def latte(latte_tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(bundle=latte_tiny.root, pipeline=save_latte_pipeline(tmp_path_factory.mktemp("latte") / "pipeline"))


@pytest.fixture(scope="session")
def qwenimage(qwen_image_tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    pipeline = save_qwen_image_pipeline(tmp_path_factory.mktemp("qwen-image") / "pipeline")
    return Saved(bundle=qwen_image_tiny.root, pipeline=pipeline)
