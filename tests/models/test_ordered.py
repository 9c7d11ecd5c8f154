"""Ordered routers: at every timestep the units of a block that are on are its first ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dyexport.backbones import get_adapter
from dyexport.backbones.base import Preset
from dyexport.calibration.segments import PlanSettings
from dyexport.calibration.widths import meet_budget, read_widths
from dyexport.checkpoints.dynamic import DYNAMIC, load_dynamic, save_dynamic
from dyexport.flops import FlopsModel
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.inputs import NoisedInputs
from dyexport.models.random_weights import random_backbone, random_dynamic
from dyexport.models.routers import OrderedRouter
from dyexport.pipeline.networks import plan_for
from dyexport.presets import PRESETS
from tests.factories import random_timesteps, spec_of, tiny_preset


def ordered(preset: Preset, *, tokens: bool = True) -> DynamicTransformer:
    """Random routers, thresholds unevenly apart."""
    model = random_dynamic(preset, tokens=tokens, router="ordered")
    generator = torch.Generator().manual_seed(3)
    for router in model.block_routers:
        for width in (router.heads, router.groups):
            assert isinstance(width, OrderedRouter)
            width.increments.data.mul_(torch.rand(width.increments.shape, generator=generator) + 0.5)
    return model


def all_prefixes(gates: Tensor) -> bool:
    """Whether no unit is on that follows one that is off: gates (..., U)."""
    return bool((gates[..., 1:] <= gates[..., :-1]).all())


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["dit", "sit"])
def test_units_that_are_on_come_first_at_every_t_and_under_noise(backbone: str) -> None:
    preset = tiny_preset(backbone)
    model = ordered(preset)
    timesteps = torch.tensor(random_timesteps(preset, 512))  # (T,)
    generator = torch.Generator().manual_seed(0)
    for noise in (None, lambda shape: 5 * torch.randn(shape, generator=generator)):
        for gates in model.width_gates(timesteps, noise):  # (T, L, U)
            assert gates[..., 0].all()
            assert len(gates.sum(-1).unique()) > 1, "widths must vary for this test to mean anything"
            assert all_prefixes(gates)


def test_thresholds_ascend_whatever_is_learned() -> None:
    router = OrderedRouter(8, 6)
    torch.nn.init.normal_(router.increments, std=30.0)
    assert (router(torch.randn(5, 8)).diff(dim=-1) <= 0).all()


@torch.no_grad()
def test_fresh_ordered_routers_change_nothing() -> None:
    preset = tiny_preset()
    model = DynamicTransformer(
        random_backbone(preset), get_adapter("dit"), heads=preset.heads, tokens=False, router="ordered"
    )
    inputs = NoisedInputs(preset=preset, batch_size=2).at(400.0)
    assert torch.equal(model(inputs).sample, model.forward_dense(inputs))
    assert min(logits.min() for logits in model.width_logits(torch.tensor([400.0]))) > 10


def test_every_ordered_router_gets_a_gradient() -> None:
    preset = tiny_preset()
    model = ordered(preset)
    output = model(NoisedInputs(preset=preset, batch_size=2).at(300.0), noise=torch.randn)
    (output.heads.sum() + output.groups.sum()).backward()
    for name, parameter in model.routers.named_parameters():
        if ".tokens." not in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_a_checkpoint_brings_ordered_routers_back(tmp_path: Path) -> None:
    preset = PRESETS["sit-digits"]
    model = random_dynamic(preset, tokens=False, router="ordered")
    save_dynamic(model, tmp_path, preset)
    loaded, _ = load_dynamic(tmp_path)
    assert loaded.router == "ordered"
    t = torch.tensor(random_timesteps(preset, 16))
    for one, other in zip(loaded.width_logits(t), model.width_logits(t), strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_a_checkpoint_from_before_ordered_routers_has_free_ones(tmp_path: Path) -> None:
    preset = PRESETS["sit-digits"]
    save_dynamic(random_dynamic(preset, tokens=False), tmp_path, preset)
    text = (tmp_path / DYNAMIC).read_text(encoding="utf-8")
    (tmp_path / DYNAMIC).write_text(text.replace(',\n  "router": "free"', ""), encoding="utf-8")
    assert "free" not in (tmp_path / DYNAMIC).read_text(encoding="utf-8")
    assert load_dynamic(tmp_path)[0].router == "free"


@pytest.mark.parametrize("budget", [0.4, 0.7])
def test_a_budget_is_met_and_four_engines_store_what_one_does(budget: float) -> None:
    preset = tiny_preset()
    model, flops = ordered(preset, tokens=False), FlopsModel.of_preset(preset)
    meet_budget(model, NoisedInputs(preset=preset, batch_size=2), budget, flops)
    widths = read_widths(model, preset.timestep_range)
    one, four = (plan_for(spec_of(preset), widths, None, PlanSettings(engines=engines)) for engines in (1, 4))
    assert four.flops_ratio == pytest.approx(budget, abs=0.02)
    assert len({tuple(map(len, segment.groups)) for segment in four.segments}) > 1
    for segment in four.segments:
        for kept in (*segment.heads, *segment.groups):
            assert kept == tuple(range(len(kept)))
    assert four.disk_bytes == one.disk_bytes < four.resident_bytes
