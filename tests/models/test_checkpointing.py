"""Gradient checkpointing: every gradient is that without it, whatever gates, noise and low-rank updates there are."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dyexport.backbones import BACKBONES
from dyexport.backbones.base import Preset, RouterKind
from dyexport.lora import LoraSpec
from dyexport.models.checkpointing import _SameGates
from dyexport.models.dynamic import DynamicOutput, DynamicTransformer
from dyexport.models.inputs import NoisedInputs
from dyexport.models.random_weights import random_dynamic
from dyexport.presets import get_preset
from dyexport.training.randomness import LogisticNoise, Share
from tests.factories import tiny_preset

LORA = LoraSpec(rank=2, experts=3, alpha=2)


def noise() -> LogisticNoise:
    return LogisticNoise(torch.Generator().manual_seed(5), Share(), 1.0)


def loss_of(model: DynamicTransformer, preset: Preset) -> tuple[DynamicOutput, Tensor]:
    """A loss of everything that training reads: the sample, the gates, and the dense model."""
    start, end = preset.timestep_range
    inputs = NoisedInputs(preset=preset, batch_size=2).at(start + 0.4 * (end - start))
    output: DynamicOutput = model(inputs, noise=noise())
    dense = model.forward_dense(inputs)
    ratio = output.heads.mean() + output.groups.mean() + output.tokens.mean()
    return output, output.sample.square().mean() + dense.square().mean() + ratio.square()


def gradients(model: DynamicTransformer, preset: Preset) -> tuple[DynamicOutput, dict[str, Tensor]]:
    output, loss = loss_of(model, preset)
    loss.backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return output, found


def check(preset: Preset, router: RouterKind = "free", td_lora: LoraSpec | None = None) -> None:
    plain = random_dynamic(preset, router=router, td_lora=td_lora)
    checkpointed = copy.deepcopy(plain)
    checkpointed.checkpoint_blocks()
    (left, expected), (right, found) = gradients(plain, preset), gradients(checkpointed, preset)
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    assert found.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not different
    assert any(name.startswith("routers.0.tokens.") for name in expected)
    assert 0 < left.tokens.mean() < 1


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("td_lora", [None, LORA], ids=["all weights", "TD-LoRA"])
def test_gradients_are_equal_bit_for_bit(backbone: str, td_lora: LoraSpec | None) -> None:
    check(tiny_preset(backbone), td_lora=td_lora)


@pytest.mark.parametrize("name", ["flux-tiny", "sit-digits"])
def test_presets_of_the_command_line_have_equal_gradients(name: str) -> None:
    check(get_preset(name), "ordered", replace_bias(LORA))


def replace_bias(spec: LoraSpec) -> LoraSpec:
    return spec.model_copy(update={"bias": "all"})


def test_a_copied_model_recomputes_itself() -> None:
    preset = tiny_preset("sit")
    model = random_dynamic(preset)
    model.checkpoint_blocks()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    plain = random_dynamic(preset)
    (_, expected), (_, found) = gradients(plain, preset), gradients(copied, preset)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def saved_bytes(model: DynamicTransformer, preset: Preset) -> int:
    """Bytes that a forward pass keeps for the backward pass, of storages other than weights."""
    weights = {value.untyped_storage().data_ptr() for value in model.state_dict().values()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, loss = loss_of(model, preset)  # kept alive, so that no address is used twice
    assert output.sample.isfinite().all()
    return sum(kept.values()) if loss.isfinite() else 0


def deeper(preset: Preset) -> Iterator[Preset]:
    for layers in (2, 6):
        yield replace(preset, layers=layers)  # type: ignore[call-arg]


def test_a_block_more_keeps_its_inputs_only() -> None:
    presets = list(deeper(tiny_preset("sit")))

    def growth(checkpointed: bool) -> int:
        models = [random_dynamic(preset) for preset in presets]
        for model in models:
            if checkpointed:
                model.checkpoint_blocks()
        small, large = (saved_bytes(*parts) for parts in zip(models, presets, strict=True))
        return large - small

    assert growth(True) * 8 < growth(False)


def contexts() -> int:
    gc.collect()
    return sum(isinstance(held, _SameGates) for held in gc.get_objects())


def test_a_pass_without_a_backward_pass_is_freed() -> None:
    preset = tiny_preset("sit")
    model = random_dynamic(preset)
    model.checkpoint_blocks()
    before = contexts()
    output, loss = loss_of(model, preset)
    assert contexts() == before + 2 * model.depth
    del output, loss
    assert contexts() == before
