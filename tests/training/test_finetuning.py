from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dyexport.flops import FlopsModel
from dyexport.training.config import FinetuneConfig
from dyexport.training.finetuning import finetune
from tests.training.helpers import DYNAMIC, SIT, blobs, dynamic, same, trainer, weights

DISTILLED = replace(DYNAMIC, distill=True, learning_rate=1e-2)


def test_finetuning_reaches_lambda_on_the_gates_that_run(tmp_path: Path) -> None:
    model = dynamic(SIT)
    pace = {"steps": 300, "warmup": 0.3, "anneal": 0.2, "settle": 0.0}  # gates that settle early stay further off here
    config = FinetuneConfig(**pace, batch_size=16, budget=0.5, learning_rate=1e-3)
    result = finetune(model, SIT, blobs(SIT), config, work_dir=tmp_path)
    assert result.history[0].flops_ratio == 1.0
    assert result.flops_ratio == pytest.approx(0.5, abs=0.06)
    assert recomputed_ratio(model) == pytest.approx(result.flops_ratio, abs=0.03)


def test_ordered_routers_close_units_from_the_last(tmp_path: Path) -> None:
    model = dynamic(SIT, seed=1, router="ordered")
    config = FinetuneConfig(steps=300, batch_size=16, budget=0.5, learning_rate=1e-3, seed=1)
    result = finetune(model, SIT, blobs(SIT), config, work_dir=tmp_path)
    assert result.history[0].flops_ratio == 1.0
    assert result.flops_ratio == pytest.approx(0.5, abs=0.1)
    gates = torch.cat(model.width_gates(torch.linspace(*SIT.timestep_range, 64)), dim=1)  # (T, 2 * L, U)
    assert 0 < gates[..., 1:].mean() < 1
    assert (gates[..., 1:] <= gates[..., :-1]).all()


@torch.no_grad()
def recomputed_ratio(model: torch.nn.Module) -> float:
    """Lambda from gates counted one by one, on inputs of this test's own."""
    flops = FlopsModel.of_preset(SIT)
    generator = torch.Generator().manual_seed(1)
    clean, conditions = blobs(SIT).batch(torch.arange(64))
    t = torch.rand(64, generator=generator)
    share = t[:, None, None, None]
    noisy = share * clean + (1 - share) * torch.randn(clean.shape, generator=generator)
    output = model.eval()({"hidden_states": noisy, "timestep": t, **conditions})
    kept = [(gates > 0.5).double().mean(-1) for gates in (output.heads, output.groups, output.token_logits.sigmoid())]
    spent = sum(
        float(
            flops.attention[block] * kept[0][sample, block]
            + flops.mlp_tokens[block] * kept[1][sample, block] * kept[2][sample, block]
        )
        for sample in range(64)
        for block in range(SIT.depth)
    )
    return spent / 64 / flops.gated


def test_complete_model_is_trained_for_its_share_of_steps_only(tmp_path: Path) -> None:
    history = trainer(tmp_path, replace(DYNAMIC, complete=0.25)).train().history
    assert [point.step for point in history if not math.isnan(point.complete)] == [0, 1, 2, 3, 4]


def test_distilled_the_dynamic_path_learns_what_the_complete_model_predicts(tmp_path: Path) -> None:
    run = trainer(tmp_path, replace(DYNAMIC, distill=True, complete=0.0, settle=0.0))
    run.step = DYNAMIC.steps - 1  # noise is annealed to zero
    batch = run.batches.at(run.step)
    whole = run.losses(batch, run.share)
    assert whole.complete is not None
    assert whole.diffusion.item() < 1e-9  # every gate is open: nothing to learn
    with torch.no_grad():
        for router in run.model.routers:
            router.shift(-40.0, tokens=True)
    cut = run.model(batch.inputs).sample - run.model.forward_dense(batch.inputs)
    assert torch.allclose(run.losses(batch, run.share).diffusion, cut.square().mean())
    assert cut.any()


def test_once_gates_settle_the_complete_model_of_before_teaches_and_the_data_counts_again(tmp_path: Path) -> None:
    run = trainer(tmp_path, DISTILLED)
    run.train()
    settled = [point.step for point in run.history if math.isnan(point.complete)]
    assert settled == list(range(12, 20))
    batch = run.batches.at(run.step)
    assert run.teacher is not None
    taught = run.teacher.predict(batch.inputs)
    now = run.model.forward_dense(batch.inputs)
    assert (taught - now).abs().max() > 1e-4  # the model has moved on, its teacher has not
    output = run.model(batch.inputs).sample
    apart, data = (output - taught).square().mean(), run.batches.objective.loss(output, batch.noised).mean()
    assert torch.allclose(run.losses(batch, run.share).diffusion, (apart + data) / 2)
    assert torch.equal(run.model.forward_dense(batch.inputs), now)
    names = dict(run.model.named_parameters(remove_duplicate=False))
    assert all(names[name] is value for name, value in run.model.named_parameters())


def test_the_teacher_is_the_average_of_the_complete_model(tmp_path: Path) -> None:
    run = trainer(tmp_path, DISTILLED)
    while run.step < DISTILLED.complete_steps:
        run.advance()
    batch = run.batches.at(run.step)
    run.losses(batch, run.share)
    assert run.teacher is not None
    taught = run.teacher.predict(batch.inputs)
    run.ema.apply()
    assert torch.equal(taught, run.model.forward_dense(batch.inputs))


def test_without_noise_the_gates_trained_are_the_gates_run(tmp_path: Path) -> None:
    run = trainer(tmp_path, replace(DYNAMIC, anneal=1.0))
    run.step = DYNAMIC.steps - 1  # noise is annealed to zero
    with torch.no_grad():
        for router in run.model.routers:
            router.shift(-15.0, tokens=True)  # logits near zero, where noise would decide
    batch = run.batches.at(run.step)
    trained = run.losses(batch, run.share)
    evaluated = run.model(batch.inputs)
    assert torch.equal(trained.diffusion, run.batches.objective.loss(evaluated.sample, batch.noised).mean())
    run.step = 0
    assert not torch.equal(run.losses(batch, run.share).diffusion, trained.diffusion)


def test_a_run_stopped_while_it_is_taught_resumes_to_the_same_bits(tmp_path: Path) -> None:
    undisturbed = trainer(tmp_path / "undisturbed", DISTILLED)
    undisturbed.train()
    stopped = trainer(tmp_path / "stopped", DISTILLED)

    def stop(step: int, *_: object) -> None:
        if step == 20:
            raise KeyboardInterrupt

    stopped.progress = stop
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = trainer(tmp_path / "stopped", DISTILLED)
    resumed.resume()
    assert resumed.step == 15  # after the gates settled
    resumed.train()
    assert same(weights(resumed.model), weights(undisturbed.model))
