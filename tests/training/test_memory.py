"""What saves memory leaves training as it is: micro-batches, recomputed blocks, a smaller base and smaller moments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dyexport.backbones.recipe import BasePrecision, Optimizer
from dyexport.errors import DyexportError, UsageError
from dyexport.lora import LoraSpec
from dyexport.models.frozen_base import lower_base
from dyexport.models.random_weights import random_dynamic
from dyexport.training.config import FinetuneConfig, TrainConfig
from dyexport.training.finetuning import DynamicTrainer
from dyexport.training.losses import Losses
from dyexport.training.trainer import Trainer
from tests.training.helpers import DYNAMIC, SIT, backbone, blobs, same, weights

LORA = LoraSpec(rank=2, experts=3, alpha=2)
SHORT = replace(DYNAMIC, steps=6, batch_size=8, checkpoint_every=2, learning_rate=1e-3)
OPTIMIZERS: tuple[Optimizer, ...] = ("adamw", "adamw-8bit")
WIDE = replace(SIT, hidden_size=64)  # weights large enough for moments in 8 bits


def new_run(work_dir: Path, config: FinetuneConfig, td_lora: LoraSpec | None = LORA) -> DynamicTrainer:
    """A run whose widths and tokens differ from sample to sample, so that noise and ratios matter."""
    preset = WIDE if config.optimizer == "adamw-8bit" else SIT
    model = random_dynamic(preset, td_lora=td_lora)
    lower_base(model, config.base_precision)
    return DynamicTrainer(model, preset, blobs(preset), config, work_dir=work_dir)


def step_of(run: DynamicTrainer) -> tuple[Mapping[str, Tensor], tuple[float, ...]]:
    """The gradients of a first step, before they are clipped, and its metrics."""
    found: dict[str, Tensor] = {}

    def note() -> None:
        found.update({name: value.grad.clone() for name, value in run.parameters.items() if value.grad is not None})
        update()

    update, run.update = run.update, note  # type: ignore[method-assign]
    run.config = replace(run.config, steps=1)
    run.train()
    return found, tuple(run.history[0])


@pytest.mark.parametrize("changes", [{}, {"distill": True, "complete": 0.0, "settle": 1.0}], ids=["", "taught"])
def test_gradients_of_micro_batches_add_up_to_those_of_the_batch(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = replace(SHORT, budget=0.3, warmup=0.0, **changes)
    expected, metrics = step_of(new_run(tmp_path / "whole", config))
    found, divided = step_of(new_run(tmp_path / "divided", replace(config, micro_batch=2)))
    assert divided == pytest.approx(metrics, rel=1e-5, nan_ok=True)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6 + 1e-4 * float(value.abs().max()))
    assert 0.2 < metrics[-1] < 0.9


def test_the_flops_ratio_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    """Gradients of each micro-batch's penalty would not add up to those of the batch's."""
    run = new_run(tmp_path, replace(SHORT, micro_batch=1))
    run.begin_step()
    assert run.overall is not None
    parts = [run.losses(run.batch(share), share).flops_ratio for share in run.shares()]
    ratios = torch.stack([part for part in parts if part is not None])
    assert ratios.std() > 0.01
    torch.testing.assert_close(run.overall, ratios.mean())


def test_recomputed_blocks_train_the_same_bits(tmp_path: Path) -> None:
    plain = new_run(tmp_path / "plain", SHORT)
    recomputed = new_run(tmp_path / "recomputed", replace(SHORT, checkpointing=True))
    assert str(plain.train().history) == str(recomputed.train().history)
    assert same(weights(plain.model), weights(recomputed.model))


def test_a_static_model_recomputes_too(tmp_path: Path) -> None:
    config = TrainConfig(steps=3, batch_size=4)
    runs = [
        Trainer(backbone(SIT), SIT, blobs(SIT), replace(config, checkpointing=on), work_dir=tmp_path / str(on))
        for on in (False, True)
    ]
    for run in runs:
        run.train()
    assert [run.model.is_gradient_checkpointing for run in runs] == [False, True]
    assert same(*(weights(run.model) for run in runs))


@pytest.mark.parametrize(("precision", "optimizer"), [("bf16", "adamw"), ("nf4", "adamw-8bit")])
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path: Path, precision: BasePrecision, optimizer: Optimizer) -> None:
    config = replace(SHORT, micro_batch=2, base_precision=precision, optimizer=optimizer, checkpointing=True)

    def stop(step: int, *_: object) -> None:
        if step == 5:
            raise KeyboardInterrupt

    whole = new_run(tmp_path / "whole", config)
    whole.train()
    stopped = new_run(tmp_path / "stopped", config)
    stopped.progress = stop
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = new_run(tmp_path / "stopped", config)
    resumed.resume()
    assert resumed.step == 4
    resumed.train()
    assert same(weights(resumed.model), weights(whole.model))
    assert not same(weights(new_run(tmp_path / "new", config).model), weights(whole.model))


def test_moments_of_8_bits_are_a_quarter_and_train(tmp_path: Path) -> None:
    sizes = {}
    for optimizer in OPTIMIZERS:
        run = new_run(tmp_path / optimizer, replace(SHORT, optimizer=optimizer), td_lora=None)
        before = weights(run.model)
        run.train()
        assert not same(weights(run.model), before)
        large = max(run.parameters.values(), key=torch.Tensor.numel)
        moments = run.optimizer.state[large]
        sizes[optimizer] = sum(value.nbytes for value in moments.values() if isinstance(value, Tensor)) / large.numel()
    assert 8 <= sizes["adamw"] < 8.01
    assert 2 <= sizes["adamw-8bit"] < 2.4


def test_the_teacher_has_no_copy_of_the_routers_and_none_of_a_frozen_base(tmp_path: Path) -> None:
    run = new_run(tmp_path, replace(SHORT, distill=True))
    run.train()
    assert run.teacher is not None
    assert run.teacher.weights
    assert all(name.startswith("td_lora.") for name in run.teacher.weights)
    assert all(name.startswith(("td_lora.", "routers.")) for name in run.ema.averages)


class Spoiled(Trainer[TrainConfig]):
    """A run whose loss or gradients become NaN at its step 6."""

    spoil_gradients = False

    def total(self, losses: Losses) -> Tensor:
        if self.step != 6:
            return losses.diffusion
        if self.spoil_gradients:
            return losses.diffusion + (losses.diffusion - losses.diffusion.detach()).sqrt()  # infinite slope at 0
        losses.diffusion.data.mul_(math.nan)
        return losses.diffusion


@pytest.mark.parametrize(("spoil_gradients", "what"), [(False, "loss"), (True, "norm of the gradients")])
def test_a_spoiled_run_stops_and_its_last_good_state_goes_on(tmp_path: Path, spoil_gradients: bool, what: str) -> None:
    config = TrainConfig(steps=8, batch_size=8, checkpoint_every=4)
    run = Spoiled(backbone(SIT), SIT, blobs(SIT), config, work_dir=tmp_path / "spoiled")
    run.spoil_gradients = spoil_gradients
    with pytest.raises(DyexportError, match=rf"the {what} is (nan|inf) at step 6; lower the learning rate"):
        run.train()
    whole = Trainer(backbone(SIT), SIT, blobs(SIT), config, work_dir=tmp_path / "whole")
    whole.train()
    resumed = Trainer(backbone(SIT), SIT, blobs(SIT), config, work_dir=tmp_path / "spoiled")
    resumed.resume()
    assert resumed.step == 4
    resumed.train()
    assert same(weights(resumed.model), weights(whole.model))


def test_micro_batches_that_do_not_divide_a_share_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="8 samples of a batch, which micro-batches of 3 do not divide"):
        new_run(tmp_path, replace(SHORT, micro_batch=3))
    assert [replace(SHORT, micro_batch=2).passes(processes) for processes in (1, 2, 4)] == [4, 2, 1]
