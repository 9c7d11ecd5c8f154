"""Static routers: the same units are on at every timestep, and every token runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dyexport.backbones import BACKBONES, get_adapter
from dyexport.backbones.base import Preset
from dyexport.bundle.tables import WidthTable
from dyexport.calibration.segments import PlanSettings
from dyexport.calibration.widths import choose_widths, meet_budget, read_widths
from dyexport.checkpoints.dynamic import DYNAMIC, load_dynamic, save_dynamic
from dyexport.errors import BudgetError, CheckpointError
from dyexport.flops import FlopsModel
from dyexport.lora import LoraSpec
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.importance import unit_importance
from dyexport.models.inputs import NoisedInputs
from dyexport.models.random_weights import random_backbone, random_dynamic
from dyexport.pipeline.networks import plan_for
from tests.backbones.tiny import CLOSE
from tests.factories import random_timesteps, spec_of, tiny_preset
from tests.slicing.cut import Cutter


def static(preset: Preset) -> DynamicTransformer:
    return random_dynamic(preset, router="static")


def untrained(preset: Preset) -> DynamicTransformer:
    adapter = get_adapter(preset.backbone)
    return DynamicTransformer(random_backbone(preset), adapter, heads=preset.heads, router="static")


def half_a_unit(preset: Preset) -> float:
    """Half of the share of lambda that the costliest head or group has."""
    flops = FlopsModel.of_preset(preset)
    return float(max(flops.head_cost.max(), flops.group_cost.max()) / preset.heads / flops.gated / 2)


def lambda_of(widths: WidthTable, preset: Preset) -> float:
    """Lambda by the paper's formula, for blocks that all cost the same."""
    channels, tokens = preset.hidden_size, preset.tokens
    attention, mlp = 4 * channels**2 * tokens + 2 * tokens**2 * channels, 8 * channels**2 * tokens
    return float((attention * widths.heads.mean() + mlp * widths.groups.mean()) / (attention + mlp))


@torch.no_grad()
@pytest.mark.parametrize("backbone", BACKBONES)
def test_one_slim_network_serves_every_t(backbone: str) -> None:
    """It has no gates and no token code, and equals the masked model."""
    preset = tiny_preset(backbone)
    model = static(preset)
    assert not model.has_token_routers
    meet_budget(model, NoisedInputs(preset=preset, batch_size=2), 0.5, FlopsModel.of_preset(preset))
    widths = read_widths(model, preset.timestep_range)
    assert len(widths.grid) == 1
    plan = plan_for(spec_of(preset), widths, None, PlanSettings(engines=4))
    (segment,) = plan.segments
    assert segment.gate_size == 0
    assert set(segment.token_paths) == {"all"}
    assert plan.executed_flops_ratio == pytest.approx(plan.network_flops_ratio)
    assert plan.flops_ratio == pytest.approx(0.5, abs=max(half_a_unit(preset), 0.0025))
    cutter, inputs = Cutter(model, preset, token_routers=False), NoisedInputs(preset=preset, batch_size=2)
    slim = cutter.load(segment)
    for t in random_timesteps(preset, 3):
        (sample,) = slim(**cutter.inputs(inputs.at(t)))
        torch.testing.assert_close(sample, model(inputs.at(t)).sample, **CLOSE)


@torch.no_grad()
def test_new_static_routers_change_nothing_and_do_not_see_t() -> None:
    preset = tiny_preset()
    model = untrained(preset)
    inputs = NoisedInputs(preset=preset, batch_size=2).at(400.0)
    assert torch.equal(model(inputs).sample, model.forward_dense(inputs))
    for logits in model.width_logits(torch.tensor([0.0, 400.0, 999.0])):  # (T, L, U)
        assert (logits == logits[:1]).all()
    assert {name.rpartition(".")[2] for name, _ in model.routers.named_parameters()} == {"bias"}


def test_every_logit_gets_a_gradient() -> None:
    preset = tiny_preset()
    model = static(preset)
    output = model(NoisedInputs(preset=preset, batch_size=2).at(300.0), noise=torch.randn)
    output.sample.square().sum().backward()
    for name, parameter in model.routers.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.all(), name


@pytest.mark.parametrize("budget", [0.4, 0.5, 0.75])
def test_a_shift_of_trained_logits_gets_nearest_to_the_budget(budget: float) -> None:
    """The units with the highest logits stay, and one more or one fewer would be no nearer."""
    preset = tiny_preset()
    model = static(preset)
    before = torch.cat([logits.flatten() for logits in model.width_logits(torch.zeros(1))])
    meet_budget(model, NoisedInputs(preset=preset, batch_size=2), budget, FlopsModel.of_preset(preset))
    widths = read_widths(model, preset.timestep_range)
    on = np.concatenate([widths.heads.flatten(), widths.groups.flatten()])
    assert before[on].min() > before[~on].max()
    assert abs(lambda_of(widths, preset) - budget) <= half_a_unit(preset) + 1e-9


def test_logits_that_are_all_equal_meet_no_budget() -> None:
    preset = tiny_preset()
    with pytest.raises(BudgetError, match=r"budget 0\.6 cannot be met"):
        meet_budget(untrained(preset), NoisedInputs(preset=preset, batch_size=2), 0.6, FlopsModel.of_preset(preset))


def test_without_training_importance_is_averaged_over_t() -> None:
    preset = tiny_preset()
    model, inputs, flops = untrained(preset), NoisedInputs(preset=preset, batch_size=2), FlopsModel.of_preset(preset)
    table = choose_widths(model, inputs, 0.5, flops, count=6)
    assert len(table.grid) == 1
    assert lambda_of(table, preset) == pytest.approx(0.5, abs=half_a_unit(preset) + 1e-9)
    points = [(index + 0.5) * 1000 / 6 for index in range(6)]
    scores = [values.mean(axis=0) for values in unit_importance(model, inputs, points)]  # (L, U) each
    for importance, kept in zip(scores, (table.heads[0], table.groups[0]), strict=True):
        for block, on in enumerate(kept):
            assert on.any()
            assert on.all() or importance[block][on].min() > importance[block][~on].max()


def test_a_budget_below_one_unit_per_block_is_refused() -> None:
    preset = tiny_preset()
    model, inputs = untrained(preset), NoisedInputs(preset=preset, batch_size=2)
    with pytest.raises(BudgetError, match="raise it"):
        choose_widths(model, inputs, 0.05, FlopsModel.of_preset(preset), count=2)


@torch.no_grad()
@pytest.mark.parametrize("stream", [False, True])
def test_a_checkpoint_brings_static_routers_back(tmp_path: Path, stream: bool) -> None:
    preset = tiny_preset()
    model = static(preset)
    save_dynamic(model, tmp_path, preset)
    loaded, _ = load_dynamic(tmp_path, stream=stream)
    assert (loaded.router, loaded.has_token_routers) == ("static", False)
    for one, other in zip(loaded.width_logits(torch.zeros(1)), model.width_logits(torch.zeros(1)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("change", [{"tokens": True}, {"td_lora": LoraSpec(rank=2, alpha=2).model_dump()}])
def test_static_routers_next_to_what_follows_t_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    preset = tiny_preset()
    save_dynamic(static(preset), tmp_path, preset)
    content = json.loads((tmp_path / DYNAMIC).read_text(encoding="utf-8"))
    (tmp_path / DYNAMIC).write_text(json.dumps({**content, **change}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="static widths go with no token routers"):
        load_dynamic(tmp_path)
