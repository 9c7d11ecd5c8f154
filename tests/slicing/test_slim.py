"""Slim torch modules against the masked model, on every token path."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from dyexport.bundle import Segment
from dyexport.calibration.segments import PlanSettings, make_segments
from dyexport.calibration.tokens import measure_tokens
from dyexport.calibration.widths import read_widths
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.inputs import NoisedInputs
from dyexport.slicing.flops import FlopsModel
from dyexport.slicing.recipes import Recipe, lay_out, materialise
from dyexport.slicing.slicer import UnitOrder, dense_reader, dense_segment, slice_segment
from tests.factories import random_timesteps, shared_tiny_model, spec_of, tiny_preset

PATHS = ["masked", "capacity", "dynamic", "compact"]


def reader(model: DynamicTransformer):
    routers = {f"routers.{name}": tensor for name, tensor in model.routers.state_dict().items()}
    return dense_reader({**model.backbone.state_dict(), **routers}, model.config)


def extra_inputs(segment: Segment, widths, stats, t: float) -> dict[str, torch.Tensor]:
    extra = {}
    if segment.gate_size:
        extra["width_gate"] = torch.from_numpy(segment.width_gate(widths, widths.row(t)))
    if segment.slot_buckets:
        extra["slots"] = torch.zeros(segment.slots(stats, t))
    return extra


@torch.no_grad()
@pytest.mark.parametrize("engines", [1, 4])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("backbone", ["dit", "sit"])
def test_slim_equals_masked(backbone: str, path: str, engines: int) -> None:
    model, preset = shared_tiny_model(backbone), tiny_preset(backbone)
    inputs = NoisedInputs(preset=preset, batch_size=2)
    widths = read_widths(model, preset.timestep_range)
    stats = measure_tokens(model, inputs, points=32, draws=8)
    flops = FlopsModel.of_preset(preset)
    segments = make_segments(widths, stats, flops, PlanSettings(engines=engines, token_path=path, capacity_margin=0.2))
    compared = 0
    for segment in segments:
        slim = slice_segment(spec_of(preset), segment, groups=model.groups).load(reader(model))
        for t in random_timesteps(preset, 24):
            if not segment.start <= t < segment.end:
                continue
            arguments = inputs.at(t)
            truth = model(arguments)
            extra = extra_inputs(segment, widths, stats, t)
            room = torch.tensor(segment.capacities) + len(extra.get("slots", ()))
            if path in ("capacity", "dynamic") and (truth.tokens.sum(-1) > room).any():
                continue
            sample, kept = slim(**arguments, **extra)
            torch.testing.assert_close(sample, truth.sample, atol=2e-5, rtol=1e-5)
            assert torch.equal(kept, truth.tokens.sum(-1).to(torch.int64))
            compared += 1
    assert compared >= 16


@torch.no_grad()
def test_dense_slim_equals_the_stock_model() -> None:
    model, preset = shared_tiny_model(), tiny_preset()
    widths = read_widths(model, preset.timestep_range)
    dense = dense_segment(spec_of(preset), UnitOrder.of(widths))
    slim = slice_segment(spec_of(preset), dense, groups=model.groups).load(reader(model))
    for t in random_timesteps(preset, 4):
        arguments = NoisedInputs(preset=preset, batch_size=3).at(t)
        torch.testing.assert_close(slim(**arguments)[0], model.complete(arguments), atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("path", PATHS)
def test_no_token_kept_is_no_special_case(path: str) -> None:
    from tests.factories import tiny_model

    model, preset = tiny_model(), tiny_preset()
    for router in model.block_routers:
        router.tokens.outer.bias.fill_(-1e4)
    widths = read_widths(model, preset.timestep_range)
    inputs = NoisedInputs(preset=preset, batch_size=2)
    stats = measure_tokens(model, inputs, points=4, draws=1)
    settings = PlanSettings(engines=1, token_path=path)
    (segment,) = make_segments(widths, stats, FlopsModel.of_preset(preset), settings)
    slim = slice_segment(spec_of(preset), segment, groups=model.groups).load(reader(model))
    arguments = inputs.at(400.0)
    sample, kept = slim(**arguments, **extra_inputs(segment, widths, stats, 400.0))
    assert kept.sum() == 0
    torch.testing.assert_close(sample, model(arguments).sample, atol=2e-5, rtol=1e-5)


def test_slim_is_physically_smaller() -> None:
    model, preset = shared_tiny_model(), tiny_preset()
    widths = read_widths(model, preset.timestep_range)
    spec = spec_of(preset)
    dense = slice_segment(spec, dense_segment(spec, UnitOrder.of(widths)), groups=model.groups)
    segments = make_segments(widths, None, FlopsModel.of_preset(preset), PlanSettings(engines=4))
    for segment in segments:
        slim = slice_segment(spec, segment, groups=model.groups)
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
