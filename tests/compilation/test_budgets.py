"""TensorRT-RTX plans of a bundle of several budgets."""

from __future__ import annotations

from pathlib import Path

import pytest

from dyexport.bundle.reader import Bundle
from tests.pipeline.tiny import build, redone, tiny_settings


@pytest.mark.slow
@pytest.mark.tensorrt
def test_every_budget_has_plans_of_its_own(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, budgets=(0.5, 0.3), targets=("onnx", "tensorrt-rtx"))
    bundle = build(settings)
    paths = [Bundle.open(bundle.root, budget=budget).engine_paths("tensorrt-rtx") for budget in (0.5, 0.3)]
    assert [set(each) for each in paths] == [{"segment-00", "conditioning"}] * 2
    first, second = (each["segment-00"].read_bytes() for each in paths)
    assert first != second
    assert redone(settings) == set()
