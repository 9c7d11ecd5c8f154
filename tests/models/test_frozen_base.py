"""A base in lower precision computes what a model with its dequantized weights computes, and is smaller."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from dyexport.backbones import BACKBONES, get_adapter
from dyexport.backbones.recipe import BasePrecision
from dyexport.checkpoints.blockwise import BlockLoader
from dyexport.checkpoints.static import save_static
from dyexport.lora import LoraSpec
from dyexport.models.devices import bf16_products
from dyexport.models.dynamic import DynamicOutput, DynamicTransformer
from dyexport.models.frozen_base import BaseWeights, FrozenLinear, lower_base
from dyexport.models.random_weights import random_backbone, random_dynamic
from tests.backbones.tiny import noised
from tests.factories import tiny_preset

LORA = LoraSpec(rank=2, experts=3, alpha=2, bias="all")
LOWER: tuple[BasePrecision, ...] = ("bf16", "int8", "nf4")
LARGEST_ERRORS = {"bf16": 0.004, "int8": 0.012, "nf4": 0.13}  # relative; half a step of 8 bits of mantissa, and so on


def lowered(backbone: str, precision: BasePrecision) -> tuple[DynamicTransformer, DynamicTransformer]:
    """A model with a base in lower precision, and one with its dequantized weights."""
    model = random_dynamic(tiny_preset(backbone), td_lora=LORA)
    lower = copy.deepcopy(model)
    lower_base(lower, precision)
    restored = {name: value.float() for name, value in BaseWeights(lower.backbone).items()}
    model.backbone.load_state_dict(restored)
    return lower, model


def run(model: DynamicTransformer, backbone: str) -> tuple[DynamicOutput, dict[str, Tensor]]:
    with bf16_products(torch.device("cpu"), enabled=True):
        output: DynamicOutput = model(noised(backbone))
        output.sample.float().square().mean().backward()
    return output, {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_it_is_the_model_of_its_dequantized_weights(backbone: str) -> None:
    lower, model = lowered(backbone, "nf4")
    (output, gradients), (expected, expected_gradients) = run(lower, backbone), run(model, backbone)
    assert torch.equal(output.sample, expected.sample)
    assert gradients.keys() == expected_gradients.keys()
    assert any(name.startswith("backbone.") and name.endswith(".bias") for name in gradients)
    for name, value in expected_gradients.items():  # the order of sums differs
        torch.testing.assert_close(gradients[name], value, rtol=0.02, atol=0.02 * float(value.abs().max()) + 1e-12)


@pytest.mark.parametrize("precision", LOWER)
def test_weights_are_as_close_as_their_bits_allow(precision: BasePrecision) -> None:
    model = random_dynamic(tiny_preset("flux"), td_lora=LORA)
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    lower_base(model, precision)
    after = BaseWeights(model.backbone)
    assert after.keys() == before.keys()
    frozen = [name for name, module in model.backbone.named_modules() if isinstance(module, FrozenLinear)]
    assert {f"transformer_blocks.0.{name}" for name in ("norm1.linear", "attn.to_q", "ff.net.2")} <= set(frozen)
    for name, value in before.items():
        if name.removesuffix(".weight") in frozen:
            error = float((after[name].float() - value).norm() / value.norm())
            assert 0 < error < LARGEST_ERRORS[precision]
        else:
            assert torch.equal(after[name], value)


def test_it_takes_the_bytes_of_its_bits() -> None:
    sizes = {}
    for precision in LOWER:
        model = random_dynamic(tiny_preset("flux"), td_lora=LORA)
        lower_base(model, precision)
        linear = cast(FrozenLinear, model.backbone.get_submodule("transformer_blocks.0.ff.net.2"))
        weights = linear.in_features * linear.out_features
        sizes[precision] = 8 * (linear.packed.nbytes + linear.scales.nbytes) / weights
    assert sizes == {"bf16": 16, "int8": 8 + 32 / linear.in_features, "nf4": 4.5}


def test_embedders_that_routers_read_stay_in_fp32() -> None:
    for backbone in BACKBONES:
        model = random_dynamic(tiny_preset(backbone), td_lora=LORA)
        t = noised(backbone)["timestep"]
        before = model.width_logits(t)
        lower_base(model, "nf4")
        assert all(torch.equal(a, b) for a, b in zip(model.width_logits(t), before, strict=True))


@torch.no_grad()
def test_a_static_model_samples_data_in_the_storage_of_the_base(tmp_path: Path) -> None:
    preset = tiny_preset("flux")
    static = random_backbone(preset)
    save_static(static, tmp_path)
    loader = BlockLoader(str(tmp_path), preset)
    lower = loader.backbone.requires_grad_(False)
    loader.load("nf4", "cpu")
    assert sum(value.nbytes for value in lower.parameters()) < sum(value.nbytes for value in static.parameters()) / 3
    assert not any(value.requires_grad for value in lower.parameters())
    static.load_state_dict({name: value.float() for name, value in BaseWeights(lower).items()})
    with bf16_products(torch.device("cpu"), enabled=True):
        assert torch.equal(*(get_adapter("flux").run(model, noised("flux")) for model in (lower, static)))


def test_nothing_is_frozen_where_everything_is_trained() -> None:
    model = random_dynamic(tiny_preset("sit"))
    lower_base(model, "bf16")
    assert not any(isinstance(module, FrozenLinear) for module in model.modules())
