from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dyexport.errors import CheckpointError, DataError, DyexportError
from dyexport.training.config import TrainConfig
from dyexport.training.data import MemorySource
from dyexport.training.ema import Ema
from dyexport.training.losses import NoisyBatch
from dyexport.training.randomness import Share
from dyexport.training.trainer import Trainer, train_static
from tests.training.helpers import DIT, DYNAMIC, SIT, backbone, blobs, same, trainer, weights

ROOT = Path(__file__).parents[2]
STATIC = TrainConfig(steps=60, batch_size=16, learning_rate=5e-3)


@pytest.mark.build
@pytest.mark.parametrize("preset", [SIT, DIT], ids=["flow", "ddpm"])
def test_static_training_learns(preset: object, tmp_path: Path) -> None:
    preset = SIT if preset is SIT else DIT
    history = train_static(backbone(preset), preset, blobs(preset), STATIC, work_dir=tmp_path).history
    losses = [point.diffusion for point in history]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_progress_counts_up_and_carries_metrics(tmp_path: Path) -> None:
    seen: list[tuple[int, int, Mapping[str, float]]] = []
    train_static(
        backbone(SIT),
        SIT,
        blobs(SIT),
        replace(STATIC, steps=25),
        work_dir=tmp_path,
        progress=lambda *args: seen.append(args),
    )
    assert [(done, total) for done, total, _ in seen] == [(step, 25) for step in range(26)]
    assert not any(metrics for _, _, metrics in seen[:10])  # reading them waits for the device
    assert all(set(metrics) == {"diffusion"} for _, _, metrics in seen[10:])


def test_clipping_clips(tmp_path: Path) -> None:
    config = replace(STATIC, steps=5, grad_clip=1e-3)
    run = Trainer(backbone(SIT), SIT, blobs(SIT), config, work_dir=tmp_path)
    norms: list[float] = []

    def note(*_: object) -> None:
        gradients = [value.grad for value in run.parameters.values() if value.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    run.optimizer.optimizer.register_step_pre_hook(note)
    run.train()
    assert norms == pytest.approx([1e-3] * 5, rel=1e-2)


def test_weights_settle_as_the_learning_rate_decays(tmp_path: Path) -> None:
    run = Trainer(backbone(SIT), SIT, blobs(SIT), replace(STATIC, steps=20, lr_decay=0.5), work_dir=tmp_path)
    moved: list[float] = []
    update = run.update

    def note() -> None:
        before = weights(run.model)
        update()
        moved.append(max(float((value.detach() - before[name]).abs().max()) for name, value in run.parameters.items()))

    run.update = note  # type: ignore[method-assign]
    run.train()
    assert moved[9] > 5 * moved[19] > 0


def test_ema_decays_as_published_and_warms_up() -> None:
    value = torch.zeros(1)
    average = Ema({"w": value}, decay=0.5)
    expected = 0.0
    for step, seen in enumerate([1.0, 4.0, -2.0, 8.0, 3.0] * 4):
        value.fill_(seen)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * seen
        assert float(average.averages["w"]) == pytest.approx(expected, rel=1e-5)
    assert decay == 0.5


def test_the_model_ends_on_its_averages(tmp_path: Path) -> None:
    run = Trainer(backbone(SIT), SIT, blobs(SIT), replace(STATIC, steps=5), work_dir=tmp_path)
    run.train()
    assert same(weights(run.model), run.ema.averages)


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.training.helpers import trainer
run = trainer(Path(sys.argv[1]))
total = run.total
def kill(losses):
    if run.step == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return total(losses)
run.total = kill
run.train()
"""


@pytest.mark.build
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    undisturbed = trainer(tmp_path / "undisturbed")
    expected = undisturbed.train()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "killed")], cwd=ROOT, env=environment, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    resumed = trainer(tmp_path / "killed")
    steps: list[int] = []
    resumed.progress = lambda step, *_: steps.append(step)
    result = resumed.train()
    assert steps == list(range(10, undisturbed.config.steps + 1))
    assert same(weights(resumed.model), weights(undisturbed.model))
    assert str(result) == str(expected)
    assert str(result.history) == str(expected.history)
    assert not list((tmp_path / "killed").glob(".*"))


@pytest.mark.build
def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    first = trainer(tmp_path)
    first.train()
    again = trainer(tmp_path)
    again.total = lambda _: pytest.fail("trained again")  # type: ignore[method-assign]
    again.train()
    assert same(weights(again.model), weights(first.model))


def test_other_settings_start_over(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    other = trainer(tmp_path, replace(DYNAMIC, seed=4))
    other.resume()
    assert other.step == 0


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    run.path.write_bytes(run.path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"training-state\.safetensors.*delete it"):
        trainer(tmp_path).train()


def test_a_work_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DyexportError, match=r"cannot write .*file/state.*; make room, or choose another directory"):
        trainer(tmp_path / "file" / "state").train()


def test_nan_loss_names_the_step_and_is_never_saved(tmp_path: Path) -> None:
    class Broken(Trainer[TrainConfig]):
        def total(self, losses):  # type: ignore[no-untyped-def]
            losses.diffusion.data.mul_(math.nan if self.step == 7 else 1.0)
            return losses.diffusion

    run = Broken(backbone(SIT), SIT, blobs(SIT), replace(STATIC, checkpoint_every=8), work_dir=tmp_path)
    with pytest.raises(DyexportError, match=r"loss is nan at step 7; lower the learning rate \(0\.005\)"):
        run.train()
    assert not run.path.exists()


def test_no_data_is_refused(tmp_path: Path) -> None:
    empty = MemorySource("nothing", torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(DataError, match="nothing holds no samples"):
        train_static(backbone(SIT), SIT, empty, STATIC, work_dir=tmp_path)


def test_labels_are_dropped_at_the_configured_rate_and_never_by_diffusers(tmp_path: Path) -> None:
    run = Trainer(
        backbone(SIT), SIT, blobs(SIT), replace(STATIC, batch_size=2000, label_dropout=0.3), work_dir=tmp_path
    )
    labels = run.batches.at(0).inputs["class_labels"]
    assert float((labels == SIT.classes).double().mean()) == pytest.approx(0.3, abs=0.04)
    kept = replace(run.batches, dropout=0.0)
    batch = kept.at(0)
    assert int(batch.inputs["class_labels"].max()) < SIT.classes
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run.losses(batch, run.share)
    assert torch.equal(torch.get_rng_state(), before)


def test_processes_share_a_batch_without_overlap_and_each_covers_all_timesteps(tmp_path: Path) -> None:
    draws = trainer(tmp_path).batches
    parts = [replace(draws, share=Share(index=index, count=2)).at(5) for index in range(2)]
    whole: NoisyBatch = draws.at(5)
    for name, values in whole.inputs.items():
        assert torch.equal(torch.cat([part.inputs[name] for part in parts]), values)
    for name, values in whole.noised._asdict().items():
        assert torch.equal(torch.cat([getattr(part.noised, name) for part in parts]), values)
    for part in parts:
        assert sorted((part.noised.timestep * 4).long().tolist()) == [0, 1, 2, 3]
