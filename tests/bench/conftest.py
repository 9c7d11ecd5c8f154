from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dyexport.bench.settings import BenchSettings, SamplingConfig
from dyexport.bundle.reader import Bundle
from dyexport.console import StageLines
from dyexport.demo import DemoReport, demo_settings, run_demo
from dyexport.pipeline.build import build_bundle
from dyexport.pipeline.run import Run
from dyexport.pipeline.settings import BuildSettings
from tests.factories import tiny_preset
from tests.runtime.bundles import TinyBundle, write_bundle


@pytest.fixture(scope="session")
def flow(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    """A bundle written by hand: quick to make, but no diffusers module has its shape."""
    return write_bundle(tmp_path_factory.mktemp("bench") / "flow", objective="flow", segments=3)


@pytest.fixture(scope="session")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    return write_bundle(tmp_path_factory.mktemp("bench") / "ddpm", segments=2)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle that the pipeline built, of a tiny SiT with random weights."""
    root: Path = tmp_path_factory.mktemp("bench") / "built"
    preset = tiny_preset("sit")
    settings = BuildSettings(
        model=preset, out=root, work=root.with_suffix(".work"), budget=0.5, random_weights=True, engines=2
    )
    build_bundle(Run(settings, StageLines()))
    return Bundle.open(root)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoReport:
    """The demo, all of it, but hardly trained."""
    settings = demo_settings(tmp_path_factory.mktemp("bench") / "demo")
    settings = replace(settings, train_steps=2, finetune_steps=12, engines=2)
    bench = BenchSettings(rounds=1, steps=2, compiled=False, threads=1)
    return run_demo(settings, StageLines(), sampling=SamplingConfig(samples=20, steps=2), bench=bench)
