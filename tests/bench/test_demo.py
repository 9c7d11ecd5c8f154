"""The demo runs from nothing to pictures, and says what it measured."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image

from dyexport.bundle.reader import Bundle
from dyexport.demo import DemoReport, demo_rows, demo_settings


def test_demo_is_build_with_its_defaults(tmp_path: Path) -> None:
    from dyexport.pipeline.settings import BuildSettings

    settings = demo_settings(tmp_path)
    assert settings == BuildSettings(model="sit-digits", budget=0.5, out=settings.out, work=settings.work)


def test_demo_leaves_a_bundle_and_pictures(demo: DemoReport) -> None:
    bundle = Bundle.open(demo.bundle)
    assert bundle.manifest.plan.flops_ratio == demo.flops_ratio
    assert demo.flops_ratio == pytest.approx(0.5, abs=0.01)
    pictures = Image.open(demo.pictures)
    assert pictures.width > 2 * pictures.height
    assert Image.open(demo.widths).width > 100


def test_demo_equals_masked_torch(demo: DemoReport) -> None:
    assert 0 < demo.max_abs_error <= 1e-4


def test_every_measurement_is_in_the_table(demo: DemoReport) -> None:
    text = " ".join(value for _, value in demo_rows(demo))
    for value in (
        f"{demo.flops_ratio:.3f}",
        "not trusted" if demo.speedup_vs_dense is None else f"{demo.speedup_vs_dense:.2f}x",
        f"{demo.frechet_dynamic:.3f}",
    ):
        assert value in text
    json.dumps(asdict(demo), allow_nan=False)
