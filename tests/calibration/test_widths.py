"""Width tables against the routers they were read from; budgets as the masked model runs them."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from dyexport.calibration.tokens import measure_tokens
from dyexport.calibration.widths import (
    SAMPLES,
    choose_widths,
    flops_ratio,
    meet_budget,
    read_widths,
    trajectory_points,
)
from dyexport.errors import BudgetError
from dyexport.flops import FlopsModel
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.inputs import NoisedInputs
from dyexport.models.routers import FreeRouter
from dyexport.pipeline.build import calibrate_model, opened, price_plans
from dyexport.stages.ledger import NullListener
from tests.factories import random_timesteps, shared_tiny_model, tiny_model, tiny_preset
from tests.pipeline.tiny import tiny_settings


def ratio_as_run(model: DynamicTransformer, inputs: NoisedInputs, points: int = 64) -> float:
    """Lambda from the gates of real forward passes, by the paper's formula and nothing of the package but the gates."""
    preset = inputs.preset
    channels, tokens = preset.hidden_size, preset.tokens
    attention = 4 * channels**2 * tokens + 2 * tokens**2 * channels
    mlp = 8 * channels**2 * tokens
    ratios = []
    for t in trajectory_points(preset.timestep_range, points):
        with torch.no_grad():
            output = model(inputs.at(float(t)))
        heads, groups, kept = output.heads.mean(-1), output.groups.mean(-1), output.tokens.mean(-1)
        ratios.append(float(((attention * heads + mlp * groups * kept) / (attention + mlp)).mean()))
    return float(np.mean(ratios))


class SwitchingModel:
    """One block, whose second head goes on at ``switch`` and whose second group goes off, for ``read_widths``."""

    table, depth, heads, groups, device = None, 1, 2, 2, torch.device("cpu")

    def __init__(self, switch: np.float32) -> None:
        self.switch = float(switch)

    def width_logits(self, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        on = torch.where(timestep >= self.switch, 1.0, -1.0)  # (B,)
        first = torch.full_like(on, torch.inf)
        return torch.stack([first, on], dim=-1)[:, None], torch.stack([first, -on], dim=-1)[:, None]


@pytest.mark.parametrize("end", [1.0, 1000.0])
@pytest.mark.parametrize("cells", [0.0, 0.3, 1.0, 1.5])
def test_the_table_sees_a_switch_near_the_end_of_the_range(end: float, cells: float) -> None:
    switch = np.float32(end * (1 - cells / SAMPLES))
    before = np.nextafter(switch, np.float32(0))
    table = read_widths(cast(DynamicTransformer, SwitchingModel(switch)), (0.0, end))
    for t, on in ((before, False), (switch, True), (np.float32(end), True)):
        row = table.row(float(t))
        assert table.heads[row, 0].tolist() == [True, on], t
        assert table.groups[row, 0].tolist() == [True, not on], t


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["dit", "sit"])
def test_table_equals_the_routers_at_any_t(backbone: str) -> None:
    model, preset = shared_tiny_model(backbone), tiny_preset(backbone)
    table = read_widths(model, preset.timestep_range)
    assert len(table.grid) > 1, "widths must vary with t for this test to mean anything"
    for t in random_timesteps(preset, 64):
        heads, groups = model.width_gates(torch.tensor([t]))
        assert np.array_equal(table.heads[table.row(t)], heads[0].numpy() > 0), t
        assert np.array_equal(table.groups[table.row(t)], groups[0].numpy() > 0), t


def test_table_steps_where_the_router_does() -> None:
    model, preset = shared_tiny_model(), tiny_preset()
    table = read_widths(model, preset.timestep_range)
    for edge in table.grid[1:]:
        before, after = model.width_logits(torch.tensor([edge - 1e-2, edge + 1e-2], dtype=torch.float32))[0] > 0
        heads_moved = bool((before != after).any())
        groups = model.width_logits(torch.tensor([edge - 1e-2, edge + 1e-2], dtype=torch.float32))[1] > 0
        assert heads_moved or bool((groups[0] != groups[1]).any()), edge


@pytest.mark.parametrize("budget", [0.4, 0.5, 0.7])
@pytest.mark.parametrize("backbone", ["dit", "sit"])
def test_budget_is_met_as_run(backbone: str, budget: float) -> None:
    model, preset = tiny_model(backbone), tiny_preset(backbone)
    inputs = NoisedInputs(preset=preset, batch_size=8)
    flops = FlopsModel.of_preset(preset)
    meet_budget(model, inputs, budget, flops)
    assert ratio_as_run(model, inputs) == pytest.approx(budget, abs=0.01)


def test_routers_that_cannot_meet_a_budget_say_so() -> None:
    model = tiny_model(tokens=False)
    for router in model.block_routers:
        for linear in (router.heads, router.groups):
            assert isinstance(linear, FreeRouter)
            torch.nn.init.zeros_(linear.weight)
            torch.nn.init.constant_(linear.bias, 15.0)
    inputs = NoisedInputs(preset=tiny_preset(), batch_size=2)
    with pytest.raises(BudgetError, match=r"budget 0\.6 cannot be met"):
        meet_budget(model, inputs, 0.6, FlopsModel.of_preset(tiny_preset()))


def test_predicted_ratio_is_the_ratio_run() -> None:
    model, preset = shared_tiny_model(), tiny_preset()
    inputs = NoisedInputs(preset=preset, batch_size=8)
    points = trajectory_points(preset.timestep_range, 64)
    stats = measure_tokens(model, inputs, points=64, repeats=1)
    table = read_widths(model, preset.timestep_range)
    flops = FlopsModel.of_preset(preset)
    predicted = flops_ratio(table, stats.mean_fraction(points), points, flops)
    assert predicted == pytest.approx(ratio_as_run(model, inputs), abs=1e-3)


@pytest.mark.parametrize("budget", [0.5, 0.75])
def test_widths_chosen_by_importance_meet_the_budget_and_keep_what_matters(budget: float) -> None:
    model, preset = tiny_model(tokens=False), tiny_preset()
    with torch.no_grad():
        for block in model.backbone.transformer_blocks:
            block.attn1.to_out[0].weight.mul_(torch.tensor([1.0, 1.0, 1.0, 0.001]).repeat_interleave(8))
    inputs = NoisedInputs(preset=preset, batch_size=4)
    flops = FlopsModel.of_preset(preset)
    model.table = choose_widths(model, inputs, budget, flops)
    assert ratio_as_run(model, inputs) == pytest.approx(budget, abs=0.01)
    assert not model.table.heads[..., 3].any()


def test_importance_cannot_go_below_one_unit_per_block() -> None:
    inputs = NoisedInputs(preset=tiny_preset(), batch_size=2)
    flops = FlopsModel.of_preset(tiny_preset())
    with pytest.raises(BudgetError, match="raise it"):
        choose_widths(tiny_model(tokens=False), inputs, 0.05, flops)


def test_ordered_widths_nest_and_share_a_store(tmp_path: Path) -> None:
    """Without training, too: at every t the units that are on are the first of one order, and the budget is met."""
    plans = {}
    for router in ("free", "ordered"):
        settings = tiny_settings(tmp_path / router, finetune_steps=0, router=router)
        with opened(settings, NullListener()) as run:
            plans[router], (_, table, _) = price_plans(run, [4])[0].plan, calibrate_model(run).tables
    for masks in (table.heads, table.groups):
        counts = masks.sum(axis=-1)  # (T, L)
        for block in range(masks.shape[1]):
            rows = masks[counts[:, block].argsort(), block]  # (T, U), narrow to wide
            assert (rows[:-1] <= rows[1:]).all()
        assert len(np.unique(counts)) > 1
    assert plans["ordered"].flops_ratio == pytest.approx(0.5, abs=0.01)
    assert plans["ordered"].disk_bytes < plans["free"].disk_bytes
