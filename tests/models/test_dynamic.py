"""The masked model against the stock one, and against masks applied by hand."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiTTransformer2DModel

from dyexport.backbones import get_adapter
from dyexport.backbones.base import Inputs
from dyexport.errors import CheckpointError
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.gates import hard_gate
from dyexport.models.inputs import NoisedInputs
from tests.factories import random_timesteps, tiny_model, tiny_preset


def inputs(t: float = 300.0, batch_size: int = 3) -> Inputs:
    return NoisedInputs(preset=tiny_preset(), batch_size=batch_size).at(t)


@torch.no_grad()
@pytest.mark.parametrize("t", random_timesteps(tiny_preset(), 4))
def test_masks_equal_zeroed_weights(t: float) -> None:
    """A unit that is off computes as if its output columns were zero; a token that is off as if its MLP were."""
    model = tiny_model(tokens=False)
    heads, groups = (gates[0] for gates in model.width_gates(torch.tensor([t])))
    assert 0 < heads.mean() < 1, "this test needs some heads off"
    masked = model(inputs(t)).sample
    for index, block in enumerate(model.backbone.transformer_blocks):
        block.attn1.to_out[0].weight.mul_(heads[index].repeat_interleave(8))
        block.ff.net[2].weight.mul_(groups[index].repeat_interleave(32))
    torch.testing.assert_close(model.forward_dense(inputs(t)), masked, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_skipped_tokens_miss_the_mlp() -> None:
    model = tiny_model()
    for router in model.block_routers:
        router.tokens.last.bias.fill_(-1e4)
    skipped = model(inputs())
    assert skipped.tokens.sum() == 0
    for block in model.backbone.transformer_blocks:
        block.ff.net[2].weight.zero_()
        block.ff.net[2].bias.zero_()
    arguments = inputs()
    heads, groups = model.width_gates(arguments["timestep"])
    expected = model.forward_masked(arguments, heads=heads, groups=groups)
    torch.testing.assert_close(skipped.sample, expected, atol=1e-5, rtol=1e-5)


def test_gates_report_hard_decisions_whatever_the_noise() -> None:
    model = tiny_model()
    quiet = model(inputs())
    noisy = model(inputs(), noise=lambda shape: torch.randn(shape) * 50)
    assert torch.equal(noisy.heads, quiet.heads)
    assert torch.equal(noisy.groups, quiet.groups)
    assert not torch.equal(noisy.sample, quiet.sample)
    assert set(quiet.heads.unique().tolist()) <= {0.0, 1.0}
    assert (quiet.tokens == (quiet.token_logits > 0)).all()


def test_hard_gate_passes_the_gradient_of_its_sigmoid() -> None:
    logits = torch.tensor([-3.0, 0.0, 2.0], requires_grad=True)
    gates = hard_gate(logits)
    assert gates.tolist() == [0.0, 0.0, 1.0]
    gates.sum().backward()
    soft = torch.sigmoid(logits.detach() / 5)
    torch.testing.assert_close(logits.grad, soft * (1 - soft) / 5)


def test_blocks_with_different_embedders_are_refused() -> None:
    stock = DiTTransformer2DModel(**tiny_preset().transformer_config())
    with pytest.raises(CheckpointError, match=r"transformer_blocks\.1\.norm1\.emb"):
        DynamicTransformer(stock, get_adapter("dit"), heads=4)


@torch.no_grad()
def test_a_failed_pass_leaves_no_masks_behind() -> None:
    model = tiny_model()
    expected = model.forward_dense(inputs())
    with pytest.raises(RuntimeError):
        model({**inputs(), "class_labels": torch.zeros(7, dtype=torch.int64)})
    assert torch.equal(model.forward_dense(inputs()), expected)
