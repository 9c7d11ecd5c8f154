from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dyexport.bench.settings import BenchSettings
from dyexport.bundle.reader import Bundle
from dyexport.console import StageLines
from dyexport.demo import DemoReport, demo_settings, run_demo
from dyexport.evaluation.settings import SamplingConfig
from dyexport.presets import get_preset
from tests.built import built_once, in_turn
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
def built(shared_folder: Path) -> Bundle:
    """A bundle that the pipeline built, of a tiny SiT with random weights."""
    return built_once(shared_folder / "bench-sit", model=tiny_preset("sit"), engines=2, baseline=True)


@pytest.fixture(scope="session")
def demo(shared_folder: Path) -> DemoReport:
    """The demo, all of it, but with half of the blocks, and hardly trained."""
    folder = shared_folder / "demo"
    with in_turn(folder):
        if (kept := folder / "report.json").exists():
            return DemoReport(**json.loads(kept.read_text()))
        shallow = replace(get_preset("sit-digits"), name="sit-digits-shallow", layers=2)
        settings = replace(demo_settings(folder), model=shallow, train_steps=2, finetune_steps=12, engines=2)
        bench = BenchSettings(rounds=4, steps=2, compiled=False, eager=False, threads=1)
        report = run_demo(settings, StageLines(), sampling=SamplingConfig(samples=20, steps=2), bench=bench)
        kept.write_text(json.dumps(asdict(report)))
        return report
