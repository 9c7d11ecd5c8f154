"""Routers of several budgets: offsets of their logits."""

from __future__ import annotations

import pytest
import torch

from dyexport.backbones import get_adapter
from dyexport.models.budgets import budget_shares
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.inputs import NoisedInputs
from dyexport.models.random_weights import random_backbone
from dyexport.models.routers import WIDTH_ROUTERS
from dyexport.presets import get_preset

PRESET = get_preset("sit-tiny")
BUDGETS = (0.3, 0.5, 0.8)


def model_of(kind: str) -> DynamicTransformer:
    """Return a model whose logits lie around zero, with another offset for each budget, block and unit."""
    torch.manual_seed(0)
    backbone = random_backbone(PRESET)
    model = DynamicTransformer(backbone, get_adapter(PRESET.backbone), heads=PRESET.heads, router=kind, budgets=BUDGETS)
    with torch.no_grad():
        for router in model.block_routers:
            router.heads.bias.zero_()
            router.groups.bias.zero_()
            if router.tokens is not None:
                router.tokens.last.bias.zero_()
            for value in router.offsets.parameters():
                value.normal_(std=2)
    return model.eval()


@pytest.mark.parametrize("kind", WIDTH_ROUTERS)
@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8, 0.4])
def test_a_fixed_budget_equals_the_budget_that_is_set(kind: str, budget: float) -> None:
    model, fixed = model_of(kind), model_of(kind)
    inputs = NoisedInputs(preset=PRESET, batch_size=2).at(0.4)
    model.budget = budget
    fixed.fix_budget(budget)
    assert not any("offsets" in name for name in fixed.state_dict())
    expected, output = model(inputs), fixed(inputs)
    for name, values in expected._asdict().items():
        torch.testing.assert_close(getattr(output, name), values, rtol=1e-5, atol=1e-5)
    model.budget = 0.7
    (heads, groups), (other_heads, other_groups) = (each.width_logits(torch.tensor([0.4])) for each in (model, fixed))
    assert not torch.equal(heads, other_heads)
    assert not torch.equal(groups, other_groups)


def test_shares_interpolate_and_take_the_nearest_outside() -> None:
    torch.testing.assert_close(budget_shares(BUDGETS, 0.4), torch.tensor([0.5, 0.5, 0.0]))
    torch.testing.assert_close(budget_shares(BUDGETS, 0.8), torch.tensor([0.0, 0.0, 1.0]))
    torch.testing.assert_close(budget_shares(BUDGETS, 0.1), torch.tensor([1.0, 0.0, 0.0]))
