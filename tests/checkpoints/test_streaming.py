"""A model whose weights stay on disk against the same model in memory: equal to the bit, and never whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dyexport.backbones.base import Preset
from dyexport.checkpoints.dynamic import load_dynamic, save_dynamic
from dyexport.checkpoints.static import load_static
from dyexport.checkpoints.streaming import must_stream
from dyexport.lora import LoraSpec
from dyexport.models.devices import bf16_products
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.importance import unit_importance
from dyexport.models.inputs import NoisedInputs
from dyexport.models.random_weights import random_dynamic
from dyexport.presets import get_preset
from tests.factories import tiny_preset

LORA = LoraSpec(rank=2, experts=2, alpha=2)


@pytest.fixture(params=["dit", "flux-tiny", "latte-tiny", "qwen-image-tiny"])
def preset(request: pytest.FixtureRequest) -> Preset:
    if request.param != "dit":
        return get_preset(request.param)
    return tiny_preset()


@pytest.fixture
def saved(preset: Preset, tmp_path: Path) -> Path:
    save_dynamic(random_dynamic(preset), tmp_path / "model", preset)
    return tmp_path / "model"


def resident(model: DynamicTransformer) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.is_meta}


@torch.no_grad()
def test_a_streamed_model_computes_the_same(preset: Preset, saved: Path) -> None:
    inputs = NoisedInputs(preset=preset, batch_size=2).at(0.4)
    streamed, whole = load_dynamic(saved, stream=True)[0], load_dynamic(saved)[0]
    for one, other in zip(streamed(inputs), whole(inputs), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(streamed.forward_dense(inputs), load_static(str(saved), preset, stream=True)(**inputs).sample)


@pytest.mark.parametrize("td_lora", [None, LORA], ids=["", "td-lora"])
def test_importance_is_the_same_and_leaves_nothing_in_memory(
    preset: Preset, tmp_path: Path, td_lora: LoraSpec | None
) -> None:
    saved = tmp_path / "model"
    save_dynamic(random_dynamic(preset, td_lora=td_lora), saved, preset)
    inputs = NoisedInputs(preset=preset, batch_size=2)
    streamed, whole = load_dynamic(saved, stream=True)[0], load_dynamic(saved)[0]
    before = resident(streamed)
    assert not any(name.startswith("backbone.") for name in before)
    for one, other in zip(*(unit_importance(m, inputs, [0.2, 0.7], 2) for m in (streamed, whole)), strict=True):
        assert one.min() > 0
        assert (one == other).all()
    assert resident(streamed) == before


@torch.no_grad()
def test_products_in_bf16_are_the_same_streamed_and_decide_no_width(preset: Preset, saved: Path) -> None:
    inputs = NoisedInputs(preset=preset, batch_size=2)
    streamed, whole = load_dynamic(saved, stream=True)[0], load_dynamic(saved)[0]
    t = torch.linspace(*preset.timestep_range, 64)
    exact, output = whole.width_logits(t), whole(inputs.at(0.4))
    with bf16_products(whole.device, enabled=True):
        assert all(torch.equal(one, other) for one, other in zip(whole.width_logits(t), exact, strict=True))
        rounded = whole(inputs.at(0.4))
        assert all(torch.equal(one, other) for one, other in zip(streamed(inputs.at(0.4)), rounded, strict=True))
        for one, other in zip(*(unit_importance(m, inputs, [0.2, 0.7], 2) for m in (streamed, whole)), strict=True):
            assert one.min() > 0
            assert (one == other).all()
    assert not torch.equal(rounded.sample.float(), output.sample)
    assert torch.equal(rounded.heads, output.heads)


def test_a_streamed_model_is_saved_with_its_routers(preset: Preset, saved: Path, tmp_path: Path) -> None:
    model, _ = load_dynamic(saved, stream=True)
    save_dynamic(model, tmp_path / "copy", preset, backbone=saved)
    assert (tmp_path / "copy" / "diffusion_pytorch_model.safetensors").is_symlink()
    expected, found = load_dynamic(saved)[0].state_dict(), load_dynamic(tmp_path / "copy")[0].state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_must_be_streamed() -> None:
    assert must_stream(10**15)
    assert not must_stream(1)
    assert must_stream(1000, memory=3999)
    assert not must_stream(1000, memory=4000)
