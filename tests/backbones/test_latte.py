"""The masked Latte against the stock module: frames and patches as rows, each with the gates of its own sample."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from dyexport.backbones import get_adapter
from dyexport.backbones.base import Inputs
from dyexport.backbones.latte.preset import LattePreset
from dyexport.calibration.widths import read_widths
from dyexport.flops import FlopsModel
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.importance import unit_importance
from dyexport.models.inputs import NoisedInputs
from dyexport.models.random_weights import random_backbone, random_dynamic
from dyexport.presets import PRESETS
from tests.factories import rank_units

PRESET = PRESETS["latte-tiny"]
assert isinstance(PRESET, LattePreset)
INPUTS = NoisedInputs(preset=PRESET, batch_size=2)
HEAD, GROUP = 32, 128  # channels
FRAMES, PATCHES = 4, 16
FLOPS = FlopsModel.of_preset(PRESET)


def model(*, tokens: bool = True) -> DynamicTransformer:
    return random_dynamic(PRESET, tokens=tokens)


def blocks(dynamic: DynamicTransformer) -> list[torch.nn.Module]:
    return dynamic.adapter.blocks(dynamic.backbone)


def test_blocks_alternate() -> None:
    """Only spatial blocks attend to the text."""
    assert [block.attn2 is not None for block in blocks(model(tokens=False))] == [True, False, True, False]


@torch.no_grad()
@pytest.mark.parametrize("t", [0.0, 310.0, 999.0])
def test_masks_equal_zeroed_weights(t: float) -> None:
    dynamic = model(tokens=False)
    heads, groups = (gates[0] for gates in dynamic.width_gates(torch.tensor([t])))
    assert 0 < heads.mean() < 1, "this test needs some heads off"
    masked = dynamic(INPUTS.at(t)).sample
    for index, block in enumerate(blocks(dynamic)):
        block.attn1.to_out[0].weight.mul_(heads[index].repeat_interleave(HEAD))
        block.ff.net[2].weight.mul_(groups[index].repeat_interleave(GROUP))
    torch.testing.assert_close(dynamic.forward_dense(INPUTS.at(t)), masked, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_every_sample_has_its_own_gates() -> None:
    """A batch at two timesteps, whose rows are eight frames or 32 patches, is its two samples one by one."""
    dynamic = model()
    early, late = INPUTS.at(900.0), INPUTS.at(50.0)
    both = {name: torch.cat([early[name][:1], late[name][1:]]) for name in early}
    output = dynamic(both)
    assert not torch.equal(output.heads[0], output.heads[1])
    for row, sample in enumerate((early, late)):
        alone = dynamic({name: value[row : row + 1] for name, value in sample.items()})
        torch.testing.assert_close(output.sample[row], alone.sample[0], atol=1e-5, rtol=1e-5)
        assert torch.equal(output.tokens[row], alone.tokens[0])


@torch.no_grad()
def test_skipped_tokens_keep_the_residual_after_attention() -> None:
    dynamic = model()
    seen: list[dict[str, Tensor]] = [{} for _ in range(dynamic.depth)]
    for index, block in enumerate(blocks(dynamic)):
        block.norm2.register_forward_pre_hook(
            partial(lambda index, module, args: seen[index].update(before=args[0]), index)
        )
        block.register_forward_hook(partial(lambda index, module, args, out: seen[index].update(after=out), index))
    output = dynamic(INPUTS.at(400.0))
    assert 0 < output.tokens.mean() < 1
    for index, block in enumerate(seen):
        rows = (2 * FRAMES, PATCHES) if index % 2 == 0 else (2 * PATCHES, FRAMES)
        assert block["before"].shape == (*rows, 128)
        kept = output.tokens[:, index].reshape(rows) > 0
        logits = dynamic.block_routers[index].tokens(block["before"])
        assert torch.equal(logits > 0, kept)
        unchanged = (block["after"] == block["before"]).all(dim=-1)
        assert torch.equal(unchanged, ~kept)


@torch.no_grad()
def test_widths_follow_the_timestep_alone() -> None:
    """Not the text, the size of a frame, or how many there are."""
    dynamic = model(tokens=False)

    def gates(inputs: Inputs) -> Tensor:
        output = dynamic(inputs)
        return torch.cat([output.heads, output.groups], dim=-1)

    plain = INPUTS.at(300.0)
    others = (
        {**plain, "encoder_hidden_states": torch.randn(2, 5, 32)},
        {**plain, "hidden_states": torch.randn(2, 4, 4, 12, 6)},
        {**plain, "hidden_states": torch.randn(2, 4, 1, 8, 8)},
    )
    assert all(torch.equal(gates(other), gates(plain)) for other in others)
    table = read_widths(dynamic, PRESET.timestep_range)
    assert len(table.grid) > 1
    assert (gates(plain)[0, :, :4].numpy() > 0).tolist() == table.heads[table.row(300.0)].tolist()


def test_ranking_puts_the_most_important_unit_first() -> None:
    dynamic = model(tokens=False)
    favor = torch.tensor([0.01, 0.01, 1.0, 0.01])
    with torch.no_grad():
        for block in blocks(dynamic):
            block.attn1.to_out[0].weight.mul_(favor.repeat_interleave(HEAD))
            block.ff.net[2].weight.mul_(favor.repeat_interleave(GROUP))
    before = dynamic.forward_dense(INPUTS.at(200.0)).detach()
    rank_units(dynamic, INPUTS, [200.0, 800.0])
    torch.testing.assert_close(dynamic.forward_dense(INPUTS.at(200.0)), before, atol=1e-5, rtol=1e-5)
    for scores in unit_importance(dynamic, INPUTS, [200.0]):
        assert (scores[0].argmax(axis=-1) == 0).all()


@torch.no_grad()
def test_training_from_scratch_starts_from_blocks_that_do_not_attend_to_the_text() -> None:
    backbone = random_backbone(replace(PRESET, name="fresh"))
    get_adapter("latte").initialize(backbone)
    assert not any(block.attn2.to_out[0].weight.any() for block in backbone.transformer_blocks)
