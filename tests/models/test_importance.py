"""Importance against ablation, and ranking."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dyexport.models import importance
from dyexport.models.importance import unit_importance
from dyexport.models.inputs import NoisedInputs
from dyexport.models.random_weights import random_dynamic
from dyexport.presets import get_preset
from tests.factories import rank_units, tiny_model, tiny_preset

INPUTS = NoisedInputs(preset=tiny_preset(), batch_size=16)


@torch.no_grad()
def ablation(model: object, block: int, t: float) -> np.ndarray:
    """Squared change of the output when one head goes: (H,)."""
    arguments = INPUTS.at(t)
    shape = (16, model.depth, 4)
    full = model.forward_masked(arguments, heads=torch.ones(shape), groups=torch.ones(shape))
    changes = []
    for head in range(4):
        heads = torch.ones(shape)
        heads[:, block, head] = 0
        changed = model.forward_masked(arguments, heads=heads, groups=torch.ones(shape))
        changes.append(float((changed - full)[:, :2].square().sum(dim=(1, 2, 3)).mean()))
    return np.array(changes)


def test_importance_agrees_with_ablation() -> None:
    """First order: removing a unit that matters little changes the output by what its gradient says."""
    model = tiny_model(tokens=False)
    with torch.no_grad():
        for block in model.backbone.transformer_blocks:
            block.attn1.to_out[0].weight.mul_(torch.tensor([0.2, 1.0, 0.5, 0.05]).repeat_interleave(8))
    heads, _ = unit_importance(model, INPUTS, [500.0])
    for block in range(3):
        measured = ablation(model, block, 500.0)
        assert (np.argsort(heads[0, block]) == np.argsort(measured)).all()
        assert 0.2 < (heads[0, block] / measured).mean() < 5


def test_ranking_puts_the_most_important_unit_first() -> None:
    model = tiny_model(tokens=False)
    with torch.no_grad():
        for block in model.backbone.transformer_blocks:
            block.attn1.to_out[0].weight.mul_(torch.tensor([0.01, 0.01, 1.0, 0.01]).repeat_interleave(8))
            block.ff.net[2].weight.mul_(torch.tensor([0.01, 1.0, 0.01, 0.01]).repeat_interleave(32))
    arguments = INPUTS.at(200.0)
    before = model.forward_dense(arguments)
    rank_units(model, INPUTS, [200.0, 800.0])
    torch.testing.assert_close(model.forward_dense(arguments), before, atol=1e-5, rtol=1e-5)
    heads, groups = unit_importance(model, INPUTS, [200.0])
    assert (heads[0].argmax(axis=-1) == 0).all()
    assert (groups[0].argmax(axis=-1) == 0).all()


@pytest.mark.parametrize("name", ["dit", "flux-tiny", "latte-tiny"])
def test_a_large_pass_is_computed_twice_block_by_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = tiny_preset() if name == "dit" else get_preset(name)
    model, inputs = random_dynamic(preset), NoisedInputs(preset=preset, batch_size=2)
    start, end = preset.timestep_range
    timesteps = [start + 0.25 * (end - start), start + 0.75 * (end - start)]
    passes: list[None] = []
    block = model.adapter.blocks(model.backbone)[0]
    block.register_forward_pre_hook(lambda *_: passes.append(None))

    kept = unit_importance(model, inputs, timesteps, probes=1)
    once = len(passes)
    monkeypatch.setattr(importance, "KEPT", 0)
    recomputed = unit_importance(model, inputs, timesteps, probes=1)

    assert len(passes) == 3 * once
    assert not model.backbone.is_gradient_checkpointing
    for one, other in zip(kept, recomputed, strict=True):
        assert np.array_equal(one, other)
