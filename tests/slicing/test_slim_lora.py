"""TD-LoRA's low-rank paths in slim networks against the masked model."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from dyexport.calibration.segments import PlanSettings, make_segments
from dyexport.calibration.widths import read_widths
from dyexport.flops import FlopsModel
from dyexport.lora import LoraSpec, Variant
from dyexport.models.random_weights import random_dynamic
from dyexport.slicing.slicer import slice_conditioning
from dyexport.slicing.store_layout import lay_out
from tests.factories import random_timesteps, tiny_preset
from tests.slicing.cut import Cutter


@pytest.mark.parametrize("backbone", ["dit", "sit", "latte"])
@pytest.mark.parametrize("variant", get_args(Variant))
def test_shorter_paths_are_prefixes_of_longer_ones(variant: Variant, backbone: str) -> None:
    """Rows of a path that is cut to fewer units take no bytes in addition to the longest cut's."""
    preset = tiny_preset(backbone)
    model = random_dynamic(preset, td_lora=LoraSpec(rank=2, experts=3, variant=variant, alpha=3))
    widths = read_widths(model, preset.timestep_range)
    segments = make_segments(widths, None, FlopsModel.of_preset(preset), PlanSettings(engines=3))
    assert any(gated for segment in segments for gated in segment.gated_groups)
    slices = [Cutter(model, preset).cut(segment) for segment in segments]
    recipes = [recipe for piece in slices for name, recipe in piece.recipes.items() if "low_rank" in name]
    assert lay_out(recipes).nbytes < sum(4096 * -(-recipe.nbytes // 4096) for recipe in dict.fromkeys(recipes))


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["dit", "latte"])
def test_gates_are_decided_in_fp32_in_half_precision_too(backbone: str) -> None:
    preset = tiny_preset(backbone)
    model = random_dynamic(preset, td_lora=LoraSpec(rank=2, experts=3, alpha=2))
    assert model.td_lora is not None
    for block in model.td_lora.block_loras:  # terms that cancel but for what fp16 cannot tell apart
        assert block.router is not None
        block.router.weight[:] += 50.0
        block.router.bias[:] += 3.3
    cutter = Cutter(model, preset)
    half = replace(cutter.context, spec=cutter.spec.model_copy(update={"precision": "fp16"}))
    network = slice_conditioning(half).load(cutter.read).experts
    assert network is not None
    embedding = model.adapter.timestep_embedding(model.backbone, torch.tensor(random_timesteps(preset, 16)))  # (T, C)
    expected = model.td_lora.gates_at(embedding).flatten(1)  # (T, L * E)
    torch.testing.assert_close(network(embedding), expected, atol=1e-5, rtol=1e-5)
