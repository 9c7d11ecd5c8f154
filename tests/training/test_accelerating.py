"""Settings of accelerate that training here would follow by half."""

from __future__ import annotations

from pathlib import Path

import pytest

from dyexport.errors import UsageError
from dyexport.training.config import TrainConfig
from dyexport.training.trainer import train_static
from tests.training.helpers import SIT, backbone, blobs, same, weights


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "STEPS is 4 .*a step of training here is one whole batch"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto", "STEPS is auto"),
        ("ACCELERATE_USE_FSDP", "true", "launch without FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "1", "launch without DeepSpeed"),
    ],
)
def test_it_is_refused_by_name_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    model = backbone(SIT)
    before = weights(model)
    with pytest.raises(UsageError, match=message):
        train_static(model, SIT, blobs(SIT), TrainConfig(steps=1, batch_size=4), work_dir=tmp_path)
    assert same(weights(model), before)


@pytest.mark.parametrize(
    ("variable", "value"), [("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"), ("ACCELERATE_USE_FSDP", "false")]
)
def test_what_changes_nothing_is_fine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    train_static(backbone(SIT), SIT, blobs(SIT), TrainConfig(steps=1, batch_size=4), work_dir=tmp_path)
