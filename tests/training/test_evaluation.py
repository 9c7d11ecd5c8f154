"""Evaluation while a model is trained: of its averaged weights, on fixed samples, without an effect on training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from dyexport.errors import CheckpointError, DyexportWarning
from dyexport.lora import LoraSpec
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.frozen_base import lower_base
from dyexport.training.config import FinetuneConfig, TrainConfig
from dyexport.training.data import MemorySource
from dyexport.training.ema import Ema
from dyexport.training.evaluation import GAP, LABELS, TILE, EvaluationSettings
from dyexport.training.finetuning import DynamicTrainer
from dyexport.training.losses import flops_ratio
from dyexport.training.tracking import METRICS, PICTURES, Monitoring
from dyexport.training.trainer import Trainer
from tests.training.helpers import (
    DIT,
    DYNAMIC,
    SIT,
    Pixels,
    Stopped,
    backbone,
    blobs,
    dynamic,
    listening_tracker,
    same,
    stop,
    weights,
)

CONFIG = replace(DYNAMIC, steps=10, batch_size=16)
EVERY = 4
DUE = [0, 4, 8, 10]  # every four steps, and at the end
BUDGETS = (0.3, 0.6)


class NoVae(Pixels):
    def open(self) -> None:
        raise CheckpointError("no VAE is known for it; give --vae to see pictures")


class Full(Pixels):
    """A decoder for which the GPU has no memory after the first picture."""

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().__call__(latents)


def held_out() -> MemorySource:
    """Other samples than those that are trained on: without noise, and without labels that differ."""
    return MemorySource("held out", torch.full((5, 1, 8, 8), 0.25), torch.full((5,), 3))


def monitoring(root: Path, decoder: Pixels | None = None, every: int = EVERY, tracker: str | None = None) -> Monitoring:
    settings = EvaluationSettings(every=every, source=held_out(), decoder=decoder or Pixels())
    return Monitoring(directory=root / "curves", tracker=tracker, evaluation=settings)


def trainer(
    root: Path,
    model: DynamicTransformer | None = None,
    config: FinetuneConfig = CONFIG,
    monitored: Monitoring | None = None,
) -> DynamicTrainer:
    return DynamicTrainer(model or dynamic(SIT), SIT, blobs(SIT), config, work_dir=root, monitoring=monitored)


def evaluations(root: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (root / "curves" / METRICS).read_text().splitlines())
    return [line for line in lines if any(name.startswith("evaluation/") for name in line)]


CONFIGS = {
    "all weights": CONFIG,
    "distilled": replace(CONFIG, distill=True),
    "budgets": replace(CONFIG, budgets=BUDGETS),
    **{name: replace(CONFIG, base_precision=name) for name in ("bf16", "int8", "nf4")},
}


def model_of(config: FinetuneConfig) -> DynamicTransformer:
    if config.base_precision == "fp32":
        return dynamic(SIT, budgets=config.budgets)
    model = dynamic(SIT, td_lora=LoraSpec(rank=2, alpha=2, experts=2))
    lower_base(model, config.base_precision)
    return model


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_evaluation_changes_no_bit_of_training(config: FinetuneConfig, tmp_path: Path) -> None:
    plain = trainer(tmp_path / "plain", model_of(config), config)
    expected = plain.train()
    run = trainer(tmp_path, model_of(config), config, monitoring(tmp_path))
    result = run.train()
    assert same(weights(run.model), weights(plain.model))
    assert str(result.history) == str(expected.history)
    assert result.flops_ratio == expected.flops_ratio
    assert [line["step"] for line in evaluations(tmp_path)] == DUE


def test_averages_are_exchanged_without_a_copy() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    average = Ema({"w": parameter}, decay=0.5)
    average.averages["w"].fill_(7.0)
    place, other = parameter.data_ptr(), average.averages["w"].data_ptr()
    with average.applied():
        assert parameter.tolist() == [7.0, 7.0]
        assert parameter.data_ptr() == other
    assert parameter.tolist() == [1.0, 2.0]
    assert (parameter.data_ptr(), average.averages["w"].data_ptr()) == (place, other)


def test_metrics_are_those_of_the_averaged_weights_under_hard_gates(tmp_path: Path) -> None:
    """The final model is the averages. Its loss is computed here from the batch that the evaluation uses."""
    run = trainer(tmp_path, config=replace(CONFIG, complete=1.0), monitored=monitoring(tmp_path))
    run.train()
    found = evaluations(tmp_path)[-1]
    evaluation = run.evaluation
    assert evaluation is not None
    batch = evaluation._batch(torch.arange(evaluation.samples))
    assert set(batch.inputs["class_labels"].tolist()) == {3}  # held out, and no label is dropped
    assert batch.noised.timestep.sort().values.diff().allclose(torch.tensor(1 / evaluation.samples))
    with torch.no_grad():
        output, whole = run.model(batch.inputs), run.model.forward_dense(batch.inputs)
    error = (output.sample - batch.noised.target).square().mean()
    assert found["evaluation/diffusion"] == pytest.approx(float(error), rel=1e-5)
    assert found["evaluation/flops_ratio"] == pytest.approx(float(flops_ratio(output, run.flops).mean()), rel=1e-5)
    dense = (whole - batch.noised.target).square().mean()
    assert found["evaluation/complete"] == pytest.approx(float(dense), rel=1e-5)


def test_every_evaluation_sees_the_same_samples(tmp_path: Path) -> None:
    """Weights that do not change have the same metrics and the same picture every time."""
    still = replace(CONFIG, learning_rate=1e-30, warmup=0.0)
    run = trainer(tmp_path, config=still, monitored=monitoring(tmp_path))
    for group in range(2):
        run.rates[group] = 0.0
    run.train()
    first, *others = [{k: v for k, v in line.items() if k != "step"} for line in evaluations(tmp_path)]
    first.pop("evaluation/complete")
    assert all({k: v for k, v in other.items() if k != "evaluation/complete"} == first for other in others)
    pictures = sorted((tmp_path / "curves" / PICTURES).iterdir())
    assert [picture.name for picture in pictures] == [f"step-{step:08d}.png" for step in DUE]
    assert len({picture.read_bytes() for picture in pictures}) == 1


def test_the_dense_model_is_evaluated_while_it_is_trained(tmp_path: Path) -> None:
    trainer(tmp_path, config=replace(CONFIG, complete=0.4), monitored=monitoring(tmp_path)).train()
    assert [line["step"] for line in evaluations(tmp_path) if "evaluation/complete" in line] == [0, 4]


def test_each_budget_is_evaluated(tmp_path: Path) -> None:
    config = replace(CONFIG, budgets=BUDGETS, warmup=0.0)
    run = trainer(tmp_path, dynamic(SIT, budgets=BUDGETS), config, monitoring(tmp_path))
    run.train()
    last = evaluations(tmp_path)[-1]
    names = {f"evaluation/{name}/{budget}" for name in ("diffusion", "flops_ratio") for budget in BUDGETS}
    assert last.keys() == {"step", *names}
    picture = Image.open(next((tmp_path / "curves" / PICTURES).iterdir()))
    assert picture.size == ((TILE + GAP) * LABELS - GAP, (TILE + GAP) * len(BUDGETS) - GAP)


@pytest.mark.parametrize("preset", [SIT, DIT], ids=["flow", "ddpm"])
def test_a_static_model_is_evaluated(preset: object, tmp_path: Path) -> None:
    preset = SIT if preset is SIT else DIT
    config = TrainConfig(steps=60, batch_size=16, learning_rate=5e-3)
    settings = EvaluationSettings(every=30, source=None, decoder=Pixels())
    monitored = Monitoring(directory=tmp_path / "curves", evaluation=settings)
    Trainer(backbone(preset), preset, blobs(preset), config, work_dir=tmp_path, monitoring=monitored).train()
    losses = [line["evaluation/diffusion"] for line in evaluations(tmp_path)]
    assert losses[-1] < losses[0]


def test_pictures_are_samples_and_go_to_the_tracker(tmp_path: Path) -> None:
    """Blobs have one level in each class, which a trained model has learned."""
    config = TrainConfig(steps=150, batch_size=32, learning_rate=5e-3)
    settings = EvaluationSettings(every=150, source=None, decoder=Pixels())
    monitored = Monitoring(directory=tmp_path / "curves", tracker="tensorboard", evaluation=settings)
    Trainer(backbone(SIT), SIT, blobs(SIT), config, work_dir=tmp_path, monitoring=monitored).train()
    pixels = np.asarray(Image.open(tmp_path / "curves" / PICTURES / "step-00000150.png"))
    levels = [float(pixels[:, start : start + TILE].mean()) for start in range(0, pixels.shape[1], TILE + GAP)]
    assert len(levels) == LABELS
    assert levels[-1] > levels[0] + 100
    events = EventAccumulator(str(tmp_path / "curves"))
    events.Reload()
    shown = events.Images("evaluation/pictures")
    assert [image.step for image in shown] == [0, 150]
    assert (shown[-1].width, shown[-1].height) == pixels.shape[1::-1]
    assert [event.step for event in events.Scalars("evaluation/diffusion")] == [0, 150]


def test_without_a_vae_there_are_losses_and_one_warning(tmp_path: Path) -> None:
    with pytest.warns(DyexportWarning, match="evaluations have no pictures: no VAE is known for it") as said:
        trainer(tmp_path, monitored=monitoring(tmp_path, NoVae())).train()
    assert len([warning for warning in said if issubclass(warning.category, DyexportWarning)]) == 1
    assert [line["step"] for line in evaluations(tmp_path)] == DUE
    assert not (tmp_path / "curves" / PICTURES).exists()


def test_pictures_end_where_memory_does_and_training_goes_on(tmp_path: Path) -> None:
    with pytest.warns(
        DyexportWarning, match="have no pictures: the GPU has no memory .*; give a smaller --micro-batch"
    ):
        trainer(tmp_path, monitored=monitoring(tmp_path, Full())).train()
    assert [line["step"] for line in evaluations(tmp_path)] == DUE
    assert [path.name for path in (tmp_path / "curves" / PICTURES).iterdir()] == ["step-00000000.png"]


def test_a_tracker_that_comes_later_gets_the_pictures_so_far(tmp_path: Path) -> None:
    config = replace(CONFIG, checkpoint_every=4)
    run = trainer(tmp_path, config=config, monitored=monitoring(tmp_path))
    stop(run, 9)
    with pytest.raises(Stopped):
        run.train()
    trainer(tmp_path, config=config, monitored=monitoring(tmp_path, tracker="tensorboard")).train()
    events = EventAccumulator(str(tmp_path / "curves"))
    events.Reload()
    assert [image.step for image in events.Images("evaluation/pictures")] == DUE


def test_a_resumed_run_has_each_evaluation_once(tmp_path: Path) -> None:
    config = replace(CONFIG, checkpoint_every=4)
    trainer(tmp_path / "whole", config=config, monitored=monitoring(tmp_path / "whole")).train()
    run = trainer(tmp_path, config=config, monitored=monitoring(tmp_path, tracker="tensorboard"))
    stop(run, 9)
    with pytest.raises(Stopped):
        run.train()
    assert [line["step"] for line in evaluations(tmp_path)] == [0, 4, 8]
    trainer(tmp_path, config=config, monitored=monitoring(tmp_path, tracker="tensorboard")).train()
    assert evaluations(tmp_path) == evaluations(tmp_path / "whole")
    events = EventAccumulator(str(tmp_path / "curves"))
    events.Reload()
    assert [event.step for event in events.Scalars("evaluation/diffusion")] == DUE


def test_an_evaluation_that_a_kill_prevented_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of step 4 was saved, and the run ended before it was evaluated."""
    got = listening_tracker(monkeypatch)
    config = replace(CONFIG, checkpoint_every=4)
    run = trainer(tmp_path, config=config, monitored=monitoring(tmp_path, tracker="aim"))
    stop(run, 4, "evaluate")
    with pytest.raises(Stopped):
        run.train()
    assert [line["step"] for line in evaluations(tmp_path)] == [0]
    trainer(tmp_path, config=config, monitored=monitoring(tmp_path, tracker="aim")).train()
    assert [line["step"] for line in evaluations(tmp_path)] == DUE
    points = [(step, "evaluation/diffusion" in values) for step, values in got if isinstance(step, int)]
    assert points == [(0, True), (4, False), (4, True), (8, False), (8, True), (10, False), (10, True)]


def test_training_data_stands_in_where_none_is_held_out(tmp_path: Path) -> None:
    settings = EvaluationSettings(every=EVERY, source=None, decoder=Pixels())
    run = trainer(tmp_path, monitored=Monitoring(directory=tmp_path / "curves", evaluation=settings))
    assert run.evaluation is not None
    assert run.evaluation.batches.source is run.batches.source
