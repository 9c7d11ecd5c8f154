"""A model that is loaded block by block against one that was loaded whole, reordered and then stored in fewer bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dyexport.backbones import BACKBONES
from dyexport.backbones.recipe import BasePrecision
from dyexport.checkpoints.blockwise import BlockLoader
from dyexport.checkpoints.static import load_static, save_static
from dyexport.lora import LoraSpec
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.frozen_base import BaseWeights, FrozenLinear, lower_base
from dyexport.models.inputs import NoisedInputs
from dyexport.models.random_weights import random_backbone
from tests.factories import rank_units, tiny_preset

LORA = LoraSpec(rank=2, experts=2, alpha=2, bias="all")


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_it_is_the_whole_model_reordered_and_then_lowered(
    backbone: str, precision: BasePrecision, tmp_path: Path
) -> None:
    preset = tiny_preset(backbone)
    save_static(random_backbone(preset), tmp_path)
    lora = LORA if precision != "fp32" else None
    loader, seen = BlockLoader(str(tmp_path), preset), []
    torch.manual_seed(0)
    whole = DynamicTransformer(load_static(str(tmp_path), preset), loader.adapter, heads=preset.heads, td_lora=lora)
    rank_units(whole, NoisedInputs(preset=preset, batch_size=1), [0.3])
    lower_base(whole, precision)
    assert whole.order is not None
    assert not torch.equal(whole.order["heads"], whole.order["heads"].sort(dim=1).values)

    model = DynamicTransformer(loader.backbone, loader.adapter, heads=preset.heads, td_lora=lora)
    loader.load(precision, "cpu", whole.order, lambda done, total: seen.append((done, total)))

    found, expected = BaseWeights(model.backbone), BaseWeights(whole.backbone)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    trained = [{name for name, value in m.named_parameters() if value.requires_grad} for m in (model, whole)]
    assert trained[0] == trained[1]
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in whole.named_parameters()}
    assert any(isinstance(module, FrozenLinear) for module in model.modules()) == (precision != "fp32")
    assert seen == [(done, preset.depth) for done in range(preset.depth + 1)]
