"""Routers that start from importance: on budget, different at each t, and open to training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dyexport.backbones import BACKBONES, get_adapter
from dyexport.backbones.base import RouterKind
from dyexport.calibration.warm_start import start_from_importance
from dyexport.calibration.widths import choose_widths, flops_ratio, read_widths, trajectory_points
from dyexport.flops import FlopsModel
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.gates import START_LOGIT, OrderedRouter, ridge
from dyexport.models.importance import rank_units
from dyexport.models.inputs import NoisedInputs
from dyexport.models.random_weights import random_backbone
from tests.factories import tiny_preset

POINTS = 8


def started(backbone: str, router: RouterKind) -> tuple[DynamicTransformer, tuple[np.ndarray, np.ndarray]]:
    """A model whose routers start from importance at lambda 0.5, and that importance."""
    preset = tiny_preset(backbone)
    module = random_backbone(preset)
    model = DynamicTransformer(module, get_adapter(backbone), heads=preset.heads, router=router).eval()
    points = trajectory_points(preset.timestep_range, POINTS).tolist()
    importance = rank_units(model, NoisedInputs(preset=preset, batch_size=2), points, 1)
    start_from_importance(model, points, importance, 0.5, FlopsModel.of_preset(preset))
    return model, importance


@pytest.mark.parametrize("backbone", BACKBONES)
def test_widths_start_near_the_budget_and_follow_t(backbone: str) -> None:
    preset = tiny_preset(backbone)
    model, _ = started(backbone, "free")
    points = trajectory_points(preset.timestep_range, 64)
    widths = read_widths(model, preset.timestep_range)
    ratio = flops_ratio(widths, np.ones((64, model.depth)), points, FlopsModel.of_preset(preset))
    assert ratio == pytest.approx(0.5, abs=0.1)
    assert len(widths.grid) > 1
    measured = torch.from_numpy(trajectory_points(preset.timestep_range, POINTS)).float()
    with torch.no_grad():
        logits = torch.cat([units[units.isfinite()] for units in model.width_logits(measured)])
    assert float(logits.abs().max()) < 1.5 * START_LOGIT, "training must be able to reverse every gate"


def test_the_units_that_are_on_are_those_that_calibration_would_choose() -> None:
    preset = tiny_preset()
    model, _ = started("dit", "free")
    inputs = NoisedInputs(preset=preset, batch_size=2)
    chosen = choose_widths(model, inputs, 0.5, FlopsModel.of_preset(preset), count=POINTS, probes=1)
    found = read_widths(model, preset.timestep_range)
    points = trajectory_points(preset.timestep_range, POINTS)
    pairs = [(chosen.heads[chosen.row(t)], found.heads[found.row(t)]) for t in points]
    pairs += [(chosen.groups[chosen.row(t)], found.groups[found.row(t)]) for t in points]
    assert np.mean([one == other for one, other in pairs]) > 0.9


@pytest.mark.parametrize("router", ["ordered", "static"])
def test_ordered_and_static_routers_start_on_budget_too(router: RouterKind) -> None:
    preset, flops = tiny_preset(), FlopsModel.of_preset(tiny_preset())
    model, _ = started("dit", router)
    widths = read_widths(model, preset.timestep_range)
    points = trajectory_points(preset.timestep_range, 64)
    assert flops_ratio(widths, np.ones((64, model.depth)), points, flops) == pytest.approx(0.5, abs=0.1)
    if router == "static":
        assert len(widths.grid) == 1
    else:
        assert (widths.heads[..., :-1] >= widths.heads[..., 1:]).all()
        assert (widths.groups[..., :-1] >= widths.groups[..., 1:]).all()


def test_an_ordered_router_takes_falling_logits_as_they_are() -> None:
    embeddings = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    score = torch.linspace(-3, 3, 6)[:, None]  # (T, 1)
    wanted = score - torch.tensor([0.0, 1.0, 1.5, 4.0])  # (T, U - 1)
    router = OrderedRouter(16, 5)
    router.start(embeddings, wanted)
    with torch.no_grad():
        torch.testing.assert_close(router(embeddings), wanted, atol=0.05, rtol=0)


def test_ridge_is_the_textbook_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randn(9, width, generator=generator, dtype=torch.float64) for width in (4, 3))
    weight, bias = ridge(inputs, targets)
    centered = inputs - inputs.mean(0)
    penalty = 1e-3 * centered.square().sum(1).mean()
    normal = centered.T @ centered + penalty * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(weight, torch.linalg.solve(normal, centered.T @ (targets - targets.mean(0))).T)
    torch.testing.assert_close(inputs.mean(0) @ weight.T + bias, targets.mean(0))


def test_gradients_reach_every_router() -> None:
    model, _ = started("sit", "free")
    inputs = NoisedInputs(preset=tiny_preset("sit"), batch_size=2)
    model(inputs.at(0.4)).sample.square().mean().backward()
    for router in model.block_routers:
        assert router.heads.weight.grad.abs().sum() > 0
        assert router.groups.weight.grad.abs().sum() > 0
