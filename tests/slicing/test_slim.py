"""Slim torch modules against the masked model, on every token path."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from dyexport.bundle.tables import UnitOrder
from dyexport.calibration.segments import PlanSettings, make_segments
from dyexport.calibration.widths import read_widths
from dyexport.flops import FlopsModel
from dyexport.slicing.recipes import Recipe, materialize
from dyexport.slicing.slicer import dense_segment
from dyexport.slicing.store_layout import lay_out
from tests.factories import shared_tiny_model, tiny_preset
from tests.slicing.cut import Cutter

PATHS = ["masked", "capacity", "dynamic", "compact"]


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
    whole = materialize(long, lambda name: dense)
    assert torch.equal(whole[:4], materialize(prefix, lambda name: dense))


def test_owners_do_not_overlap() -> None:
    rng = np.random.default_rng(0)
    recipes = [rows(tuple(rng.permutation(6)[: rng.integers(1, 7)].tolist())) for _ in range(30)]
    layout = lay_out(recipes)
    spans = sorted((layout.offsets[owner], layout.offsets[owner] + owner.nbytes) for owner in layout.owners)
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(spans))
    assert spans[-1][1] <= layout.nbytes
