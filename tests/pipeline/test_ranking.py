"""Units are ranked before fine-tuning as in the whole model in fp32, and a killed run ranks none of them again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dyexport.backbones import BACKBONES
from dyexport.backbones.recipe import BasePrecision
from dyexport.calibration.widths import trajectory_points
from dyexport.checkpoints.static import load_static, save_static
from dyexport.models import importance
from dyexport.models.devices import bf16_products
from dyexport.models.importance import order_of, unit_importance
from dyexport.models.inputs import NoisedInputs
from dyexport.models.random_weights import random_backbone
from dyexport.pipeline.build import finetune_model, opened
from dyexport.pipeline.calibration_inputs import calibration_inputs
from dyexport.pipeline.ranking import RANKING_POINTS, UnitRanking, dense_model
from dyexport.pipeline.settings import BuildSettings
from dyexport.pipeline.steps import attach_routers
from dyexport.stages.ledger import NullListener, SingleProcess
from dyexport.training.data import open_source
from tests.factories import tiny_preset
from tests.pipeline.test_low_memory import trained_settings
from tests.pipeline.tiny import tiny_settings

ALIKE = 0.9  # correlation of logarithms, of units that differ little: their weights are random


def ranking_of(settings: BuildSettings, root: Path, **values: Any) -> UnitRanking:
    given = {"static": root / "checkpoint", "source": open_source(str(root / "data"), settings.preset), **values}
    given = {"file": root / "scratch" / "ranking.safetensors", "origin": "this", **given}
    return UnitRanking(settings=settings, group=SingleProcess(), **given)


@pytest.mark.parametrize("memory", [None, 0], ids=["in memory", "streamed"])
def test_on_a_cpu_the_order_is_that_of_the_whole_model_in_fp32(tmp_path: Path, memory: int | None) -> None:
    settings = trained_settings(tmp_path, base_precision="nf4", memory=memory)
    ranking = ranking_of(settings, tmp_path)
    whole = attach_routers(load_static(str(ranking.static), settings.preset), settings)
    points = trajectory_points(settings.preset.timestep_range, RANKING_POINTS).tolist()
    expected = order_of(*unit_importance(whole, calibration_inputs(settings, ranking.source), points))
    order = ranking.order()
    assert order.keys() == expected.keys()
    assert all(torch.equal(order[name], value) for name, value in expected.items())


def stop_at(pass_: int, seen: list[int]) -> Any:
    def progress(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) > pass_:
            raise KeyboardInterrupt

    return progress


def test_a_killed_ranking_goes_on_after_its_last_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = trained_settings(tmp_path)
    monkeypatch.setattr(NoisedInputs, "per_pass", 2)
    undisturbed = ranking_of(settings, tmp_path, file=tmp_path / "other.safetensors").order()
    begun: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        ranking_of(settings, tmp_path, progress=stop_at(2, begun)).order()
    went_on: list[int] = []
    order = ranking_of(settings, tmp_path, progress=stop_at(99, went_on)).order()
    assert (begun, went_on) == ([0, 2, 4], [4, 6, 8])
    assert all(torch.equal(order[name], value) for name, value in undisturbed.items())

    kept = ranking_of(settings, tmp_path, static=tmp_path / "nowhere").order()
    assert all(torch.equal(kept[name], value) for name, value in undisturbed.items())
    again: list[int] = []
    ranking_of(settings, tmp_path, origin="another", progress=stop_at(99, again)).order()
    assert again == [0, 2, 4, 6, 8]


class Phases(NullListener):
    """Remembers what the stage that fine-tunes reports, and presses Ctrl-C at its ``last`` step."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.seen: dict[str, None] = {}

    def advanced(self, stage: str, done: int, total: int, detail: str = "") -> None:
        if stage != "dynamic":
            return
        phase = detail.partition("  ")[0]
        self.seen[phase if phase.endswith(("units", "weights")) else "training"] = None
        if self.seen.keys() >= {"training"} and done == self.last:
            raise KeyboardInterrupt


def test_a_run_that_is_killed_in_training_has_its_order(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, random_weights=False, train_steps=2, finetune_steps=3)
    killed, resumed = Phases(1), Phases(-1)
    with pytest.raises(KeyboardInterrupt), opened(settings, killed) as run:
        finetune_model(run)
    with opened(settings, resumed) as run:
        finetune_model(run)
    assert [*killed.seen] == ["ranking of units", "loading of weights", "training"]
    assert [*resumed.seen] == ["loading of weights", "training"]


@pytest.mark.parametrize("precision", ["bf16", "nf4"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_base_in_lower_precision_ranks_much_alike(
    backbone: str, precision: BasePrecision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = tiny_preset(backbone)
    save_static(random_backbone(preset), tmp_path / "checkpoint")
    settings = tiny_settings(tmp_path, model=preset)
    inputs, points = NoisedInputs(preset=preset, batch_size=4), [0.2, 0.7]
    exact = unit_importance(dense_model(settings, tmp_path / "checkpoint", "fp32", "cpu"), inputs, points, 2)
    model = dense_model(settings, tmp_path / "checkpoint", precision, "cpu")
    with bf16_products(torch.device("cpu"), enabled=True):
        found = unit_importance(model, inputs, points, 2)
        monkeypatch.setattr(importance, "KEPT", 0)
        recomputed = unit_importance(model, inputs, points, 2)
    for values, expected, again in zip(found, exact, recomputed, strict=True):
        assert np.array_equal(values, again)
        assert not np.array_equal(values, expected)
        assert np.corrcoef(np.log(values).ravel(), np.log(expected).ravel())[0, 1] > ALIKE
