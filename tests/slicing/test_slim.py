"""Slim torch modules against the masked model, on every token path."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from dyexport.bundle.manifest import Segment
from dyexport.bundle.tables import UnitOrder
from dyexport.calibration.segments import PlanSettings, make_segments
from dyexport.calibration.tokens import measure_tokens
from dyexport.calibration.widths import read_widths
from dyexport.flops import FlopsModel
from dyexport.models.inputs import NoisedInputs
from dyexport.slicing.recipes import Recipe, lay_out, materialise
from dyexport.slicing.slicer import dense_segment
from tests.factories import random_timesteps, shared_tiny_model, tiny_preset
from tests.slicing.cut import Cutter, fits, routed_inputs

PATHS = ["masked", "capacity", "dynamic", "compact"]


def assert_kept(segment: Segment, kept: list[torch.Tensor], tokens: torch.Tensor) -> None:
    """Counts (B, R) are of the blocks where room is limited, and absent where it is nowhere."""
    wanted = tokens.sum(-1).to(torch.int64)[:, list(segment.limited_blocks)]
    assert len(kept) == bool(segment.limited_blocks)
    assert all(torch.equal(counts, wanted) for counts in kept)


@torch.no_grad()
@pytest.mark.parametrize("engines", [1, 4])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("backbone", ["dit", "sit", "latte"])
def test_slim_equals_masked(backbone: str, path: str, engines: int) -> None:
    model, preset = shared_tiny_model(backbone), tiny_preset(backbone)
    inputs = NoisedInputs(preset=preset, batch_size=2)
    widths = read_widths(model, preset.timestep_range)
    stats = measure_tokens(model, inputs, points=32, draws=8)
    flops = FlopsModel.of_preset(preset)
    segments = make_segments(widths, stats, flops, PlanSettings(engines=engines, token_path=path, capacity_margin=0.2))
    compared, cutter = 0, Cutter(model, preset)
    for segment in segments:
        slim = cutter.load(segment)
        for t in random_timesteps(preset, 24):
            if not segment.start <= t < segment.end:
                continue
            arguments = inputs.at(t)
            truth = model(arguments)
            routed = routed_inputs(segment, widths, stats, t)
            if not fits(segment, truth.tokens.sum(-1), len(routed.get("slots", ()))):
                continue
            sample, *kept = slim(**cutter.inputs(arguments), **routed)
            torch.testing.assert_close(sample, truth.sample, atol=2e-5, rtol=1e-5)
            assert_kept(segment, kept, truth.tokens)
            compared += 1
    assert compared >= 16


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["dit", "latte"])
def test_dense_slim_equals_the_stock_model(backbone: str) -> None:
    model, preset = shared_tiny_model(backbone), tiny_preset(backbone)
    widths = read_widths(model, preset.timestep_range)
    cutter = Cutter(model, preset)
    slim = cutter.load(dense_segment(cutter.spec, UnitOrder.of(widths)))
    for t in random_timesteps(preset, 4):
        arguments = NoisedInputs(preset=preset, batch_size=3).at(t)
        torch.testing.assert_close(
            slim(**cutter.inputs(arguments))[0], model.forward_dense(arguments), atol=2e-5, rtol=1e-5
        )


@torch.no_grad()
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("backbone", ["dit", "latte"])
def test_no_token_kept_is_no_special_case(backbone: str, path: str) -> None:
    from tests.factories import tiny_model

    model, preset = tiny_model(backbone), tiny_preset(backbone)
    for router in model.block_routers:
        router.tokens.outer.bias.fill_(-1e4)
    widths = read_widths(model, preset.timestep_range)
    inputs = NoisedInputs(preset=preset, batch_size=2)
    stats = measure_tokens(model, inputs, points=4, draws=1)
    settings = PlanSettings(engines=1, token_path=path)
    (segment,) = make_segments(widths, stats, FlopsModel.of_preset(preset), settings)
    cutter, arguments = Cutter(model, preset), inputs.at(400.0)
    truth = model(arguments)
    assert truth.tokens.sum() == 0
    routed = routed_inputs(segment, widths, stats, 400.0)
    sample, *kept = cutter.load(segment)(**cutter.inputs(arguments), **routed)
    assert_kept(segment, kept, truth.tokens)
    torch.testing.assert_close(sample, truth.sample, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("backbone", ["dit", "latte"])
def test_slim_is_physically_smaller(backbone: str) -> None:
    model, preset = shared_tiny_model(backbone), tiny_preset(backbone)
    widths = read_widths(model, preset.timestep_range)
    cutter = Cutter(model, preset)
    dense = cutter.cut(dense_segment(cutter.spec, UnitOrder.of(widths)))
    segments = make_segments(widths, None, FlopsModel.of_preset(preset), PlanSettings(engines=4))
    for segment in segments:
        slim = cutter.cut(segment)
        for index in range(preset.depth):
            shape = slim.recipes[f"blocks.{index}.qkv.weight"].shape
            assert shape == (3 * 8 * len(segment.heads[index]), 32)
        assert slim.nbytes <= dense.nbytes


def rows(units: tuple[int, ...], source: str = "w") -> Recipe:
    return Recipe(kind="rows", sources=(source,), shape=(2 * len(units), 5), units=units, unit_size=2)


def test_prefixes_share_bytes() -> None:
    long, prefix, other = rows((3, 1, 0)), rows((3, 1)), rows((1, 3))
    layout = lay_out([prefix, other, long, rows((3, 1, 0), "v")])
    assert layout.offsets[prefix] == layout.offsets[long]
    assert layout.offsets[other] != layout.offsets[long]
    assert len(layout.owners) == 3
    dense = torch.randn(8, 5)
    whole = materialise(long, lambda name: dense)
    assert torch.equal(whole[:4], materialise(prefix, lambda name: dense))


def test_owners_do_not_overlap() -> None:
    rng = np.random.default_rng(0)
    recipes = [rows(tuple(rng.permutation(6)[: rng.integers(1, 7)].tolist())) for _ in range(30)]
    layout = lay_out(recipes)
    spans = sorted((layout.offsets[owner], layout.offsets[owner] + owner.nbytes) for owner in layout.owners)
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(spans))
    assert spans[-1][1] <= layout.nbytes
