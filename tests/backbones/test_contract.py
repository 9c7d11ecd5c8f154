"""The contract of a backbone, for every backbone: masked model, conditions and stand-in.

A new backbone is tested here as soon as its name is in ``BACKBONES`` and its presets contain a small one.
"""

from __future__ import annotations

import inspect

import pytest
import torch

from dyexport.backbones import BACKBONES, get_adapter, get_conditioning, get_stand_in
from dyexport.calibration.tokens import measure_tokens
from dyexport.calibration.widths import choose_widths, meet_budget, read_widths
from dyexport.flops import FlopsModel
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.importance import unit_importance
from dyexport.models.inputs import NoisedInputs
from dyexport.models.random_weights import random_backbone
from dyexport.slicing.merging import updated_names
from tests.backbones.tiny import EARLY, LATE, noised, t_at
from tests.factories import rank_units, tiny_model, tiny_preset
from tests.slicing.cut import Cutter

pytestmark = pytest.mark.parametrize("backbone", BACKBONES)


@torch.no_grad()
def test_open_gates_are_the_stock_module(backbone: str) -> None:
    """Built by the adapter or by diffusers, alone or masked by routers that are new."""
    preset, adapter = tiny_preset(backbone), get_adapter(backbone)
    backbone_module = random_backbone(preset)
    assert type(backbone_module) is adapter.stock
    assert adapter.stock.__name__ == preset.stock
    inputs = noised(backbone, batch_size=3)
    diffusers_own = adapter.stock(**preset.transformer_config()).eval()
    diffusers_own.load_state_dict(backbone_module.state_dict(), strict=True)
    expected = diffusers_own(**inputs).sample
    assert torch.equal(adapter.run(backbone_module, inputs), expected)
    model = DynamicTransformer(backbone_module, adapter, heads=preset.heads)
    output = model(inputs)
    assert torch.equal(output.sample, expected)
    assert torch.equal(model.forward_dense(inputs), expected)
    assert output.tokens.shape == (3, preset.depth, preset.tokens)
    assert output.tokens.all()


def test_parameters_are_counted(backbone: str) -> None:
    preset = tiny_preset(backbone)
    with torch.device("meta"):
        module = get_adapter(backbone).build(preset.transformer_config())
    assert preset.parameters == sum(parameter.numel() for parameter in module.parameters())
    assert preset.depth == len(get_adapter(backbone).blocks(module))


def test_kinds_of_token_routers_are_the_same_everywhere(backbone: str) -> None:
    """In presets, in the masked model and in FLOPs: the oldest first."""
    preset = tiny_preset(backbone)
    assert preset.token_routers == tuple(get_adapter(backbone).token_routers)
    assert preset.token_routers == tuple(FlopsModel.of_preset(preset).routers)
    assert tiny_model(backbone).token_router == preset.token_routers[-1]


@torch.no_grad()
def test_training_from_scratch_starts_from_zero(backbone: str) -> None:
    module = random_backbone(tiny_preset(backbone))
    get_adapter(backbone).initialize(module)
    assert get_adapter(backbone).run(module, noised(backbone)).count_nonzero() == 0


@torch.no_grad()
def test_permuting_units_changes_nothing(backbone: str) -> None:
    model, inputs = tiny_model(backbone), noised(backbone)
    before = model.forward_dense(inputs)
    weights = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    for block in range(model.depth):
        heads, groups = torch.arange(model.heads).roll(1), torch.arange(model.groups).flip(0)
        model.adapter.permute_units(model.backbone, block, heads, groups)
    torch.testing.assert_close(model.forward_dense(inputs), before, atol=1e-5, rtol=1e-5)
    moved = {name for name, value in model.backbone.state_dict().items() if not torch.equal(value, weights[name])}
    assert updated_names(Cutter(model, tiny_preset(backbone)).spec) <= moved, "every linear that gates touch"


def test_ranking_sorts_units_and_changes_nothing(backbone: str) -> None:
    model, inputs = tiny_model(backbone, tokens=False), NoisedInputs(preset=tiny_preset(backbone), batch_size=2)
    times = [t_at(backbone, share) for share in (EARLY, LATE)]
    with torch.no_grad():
        before = model.forward_dense(inputs.at(times[0]))
    rank_units(model, inputs, times)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_dense(inputs.at(times[0])), before, atol=1e-5, rtol=1e-5)
    for scores in unit_importance(model, inputs, times):
        mean = scores.mean(axis=0)  # (L, U)
        assert (mean[:, 1:] <= mean[:, :-1] * 1.001).all()


@torch.no_grad()
def test_widths_follow_the_timestep_alone(backbone: str) -> None:
    """Not noise or conditions; and the table of widths has what routers decide."""
    model, preset = tiny_model(backbone, tokens=False), tiny_preset(backbone)
    t = t_at(backbone, EARLY)
    one, other = (model(NoisedInputs(preset=preset, batch_size=2, seed=seed).at(t)) for seed in (0, 1))
    assert not torch.equal(one.sample, other.sample)
    assert torch.equal(one.heads, other.heads)
    assert torch.equal(one.groups, other.groups)
    table = read_widths(model, preset.timestep_range)
    assert len(table.grid) > 1
    assert (one.heads[0].numpy() > 0).tolist() == table.heads[table.row(t)].tolist()
    assert (one.groups[0].numpy() > 0).tolist() == table.groups[table.row(t)].tolist()


@torch.no_grad()
def test_budget_is_met_as_run(backbone: str) -> None:
    preset = tiny_preset(backbone)
    model, flops, inputs = tiny_model(backbone), FlopsModel.of_preset(preset), NoisedInputs(preset=preset, batch_size=2)
    meet_budget(model, inputs, 0.6, flops)
    ratios = []
    for share in (torch.arange(32) + 0.5) / 32:
        output = model(inputs.at(t_at(backbone, float(share))))
        kept = (gates.mean(-1) for gates in (output.heads, output.groups, output.tokens))
        ratios.append(flops.flops_ratio(*kept).mean())
    assert float(torch.stack(ratios).mean()) == pytest.approx(0.6, abs=0.02)
    stats = measure_tokens(model, inputs, points=4, repeats=1)
    assert (stats.tokens, stats.mean.shape) == (preset.tokens, (4, preset.depth))


def test_widths_chosen_without_training_meet_the_budget(backbone: str) -> None:
    preset = tiny_preset(backbone)
    model, inputs = tiny_model(backbone, tokens=False), NoisedInputs(preset=preset, batch_size=2)
    model.table = choose_widths(model, inputs, 0.5, FlopsModel.of_preset(preset))
    assert model.table.heads.shape[1:] == (preset.depth, preset.heads)
    assert model(noised(backbone, LATE)).sample.isfinite().all()


def test_every_router_gets_a_gradient(backbone: str) -> None:
    model = tiny_model(backbone)
    model(noised(backbone), noise=torch.randn).sample.square().mean().backward()
    for name, parameter in model.routers.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_conditions_are_arguments_of_the_stock_module(backbone: str) -> None:
    preset = tiny_preset(backbone)
    conditioning = get_conditioning(preset)
    drawn = conditioning.random(3, torch.Generator().manual_seed(0))
    again = conditioning.random(3, torch.Generator().manual_seed(0))
    assert drawn.keys() == {column.argument for column in conditioning.columns}
    assert all(torch.equal(value, again[name]) for name, value in drawn.items())
    dropped = conditioning.drop(drawn, torch.tensor([True, False, False]))
    assert all(torch.equal(dropped[name][1:], value[1:]) for name, value in drawn.items())
    assert noised(backbone).keys() <= inspect.signature(get_adapter(backbone).stock.forward).parameters.keys()


def test_the_stand_in_is_called_like_the_stock_module(backbone: str) -> None:
    stand_in, stock = get_stand_in(backbone), get_adapter(backbone).stock
    assert issubclass(stand_in, stock)
    names = [list(inspect.signature(class_.forward).parameters) for class_ in (stand_in, stock)]
    assert names[0] == names[1]
