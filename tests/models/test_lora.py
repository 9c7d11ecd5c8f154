"""TD-LoRA on the masked model: what it starts as, what it computes, how many parameters it has."""

from __future__ import annotations

import copy

import pytest
import torch

from dyexport.backbones import get_adapter
from dyexport.backbones.base import Preset
from dyexport.errors import UsageError
from dyexport.lora import LoraSpec, parse_lora
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.inputs import NoisedInputs
from dyexport.models.random_weights import random_backbone, random_dynamic
from dyexport.models.td_lora import LowRank
from dyexport.presets import get_preset
from tests.factories import tiny_preset

VARIANTS = ["standard", "inverse", "symmetric"]
PRESETS = [tiny_preset(), get_preset("flux-tiny"), get_preset("latte-tiny")]


def spec(variant: str = "standard", **values: int) -> LoraSpec:
    return LoraSpec.model_validate({"rank": 2, "experts": 3, "variant": variant, "alpha": 4, **values})


def fresh(preset: Preset, td_lora: LoraSpec | None) -> DynamicTransformer:
    torch.manual_seed(0)
    adapter = get_adapter(preset.backbone)
    return DynamicTransformer(random_backbone(preset), adapter, heads=preset.heads, td_lora=td_lora).eval()


@torch.no_grad()
@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
@pytest.mark.parametrize("variant", VARIANTS)
def test_untrained_it_changes_nothing(preset: Preset, variant: str) -> None:
    plain, model = fresh(preset, None), fresh(preset, spec(variant))
    inputs = NoisedInputs(preset=preset, batch_size=2).at(0.3 * preset.timestep_range[1])
    assert torch.equal(model(inputs).sample, plain(inputs).sample)
    assert torch.equal(model.forward_dense(inputs), plain.forward_dense(inputs))


@torch.no_grad()
@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_the_backbone_with_changed_weights(preset: Preset, variant: str) -> None:
    """Hooked to the linears, at the gates of one t, it is W + scale * sum_i g_i B_i A_i written out."""
    model = random_dynamic(preset, td_lora=spec(variant))
    inputs = NoisedInputs(preset=preset, batch_size=2).at(0.3 * preset.timestep_range[1])
    expected, untouched = model.forward_dense(inputs), copy.deepcopy(model.backbone)
    embedding = model.adapter.timestep_embedding(model.backbone, inputs["timestep"])
    gates = model.td_lora.gates_at(embedding)[0]  # (L, E)
    torch.testing.assert_close(gates.sum(-1), torch.ones(model.depth))
    assert gates.std(dim=0).min() > 0
    for block, lora, mixed in zip(model.adapter.blocks(model.backbone), model.td_lora.block_loras, gates, strict=True):
        for name, linear in model.lora_linears(block).items():
            linear.weight += written_out(lora.layer(name), mixed)
            torch.nn.init.zeros_(lora.layer(name).up)
    torch.testing.assert_close(model.forward_dense(inputs), expected, atol=1e-5, rtol=1e-5)
    assert (untouched.proj_out_2.weight if preset.backbone == "dit" else untouched.proj_out.weight).std() > 0
    model.backbone.load_state_dict(untouched.state_dict())
    assert (model.forward_dense(inputs) - expected).abs().max() > 1e-3  # the updates differ from zero


def written_out(layer: LowRank, gates: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(len(layer.up), len(layer.down))
    for expert, gate in enumerate(gates):
        down = layer.down[:, :, min(expert, layer.down.shape[2] - 1)]  # (in, r)
        up = layer.up[:, :, min(expert, layer.up.shape[2] - 1)]  # (out, r)
        total += gate * up @ down.T
    return layer.spec.alpha / layer.spec.rank * total


@torch.no_grad()
def test_samples_of_a_batch_may_differ_in_t() -> None:
    preset = tiny_preset()
    model = random_dynamic(preset, td_lora=spec("symmetric"))
    inputs = dict(NoisedInputs(preset=preset, batch_size=2).at(0.0))
    inputs["timestep"] = torch.tensor([100.0, 900.0])
    together = model.forward_dense(inputs)
    for row in range(2):
        alone = model.forward_dense({name: value[row : row + 1] for name, value in inputs.items()})
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_copy_has_updates_of_its_own() -> None:
    preset = tiny_preset()
    model = random_dynamic(preset, td_lora=spec())
    inputs = NoisedInputs(preset=preset, batch_size=2).at(300.0)
    before, twin = model.forward_dense(inputs), copy.deepcopy(model)
    for layer in model.td_lora.block_loras:
        for value in layer.layers.parameters():
            value.zero_()
    assert torch.equal(twin.forward_dense(inputs), before)
    assert not torch.equal(model.forward_dense(inputs), before)


@torch.no_grad()
def test_one_expert_is_merged_exactly() -> None:
    preset = tiny_preset()
    model = random_dynamic(preset, td_lora=spec(experts=1))
    assert all(block.router is None for block in model.td_lora.block_loras)
    inputs = NoisedInputs(preset=preset, batch_size=2).at(300.0)
    before = model(inputs).sample
    model.merge_lora()
    torch.testing.assert_close(model(inputs).sample, before, atol=1e-5, rtol=1e-5)
    assert model.td_lora is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_those_of_the_formula(variant: str) -> None:
    preset, rank, experts = tiny_preset(), 2, 3
    model = fresh(preset, spec(variant, rank=rank, experts=experts))
    channels = preset.hidden_size
    shares = {"standard": (1, experts), "inverse": (experts, 1), "symmetric": (experts, experts)}
    down, up = shares[variant]
    sizes = [(channels, channels)] * 4 + [(channels, 4 * channels), (4 * channels, channels)]
    block = sum(rank * (inputs * down + outputs * up) for inputs, outputs in sizes) + (channels + 1) * experts
    assert sum(value.numel() for value in model.td_lora.parameters()) == preset.depth * block
    assert not any(value.requires_grad for value in model.backbone.parameters())
    assert all(value.requires_grad for value in model.routers.parameters())


def test_specifications() -> None:
    assert parse_lora(None) is None
    assert parse_lora("rank=16") == LoraSpec(rank=16, experts=4, alpha=16)
    spec = parse_lora("rank=8, experts=2,variant=inverse,alpha=4")
    assert spec == LoraSpec(rank=8, experts=2, variant="inverse", alpha=4)
    assert spec is not None
    assert spec.scale == 0.5
    assert spec.bias == "none"
    assert parse_lora("rank=8,experts=2,bias=all") == LoraSpec(rank=8, experts=2, alpha=8, bias="all")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not one of rank, experts, variant, alpha and bias"),
        ("16", "'16' is not one of"),
        ("experts=4", "has no rank; write rank=16,experts=4"),
        ("rank=16,rank=8", "'rank=8' is not one of .* once each"),
        ("rank=16,heads=2", "'heads=2' is not one of"),
        ("rank=0", "rank is '0'; use a whole number from 1 to"),
        ("rank=1.5", "rank is '1.5'; use a whole number from 1 to"),
        ("rank=", "rank is ''; use a whole number from 1 to"),
        ("rank=4,experts=none", "experts is 'none'; use a whole number from 1 to"),
        ("rank=4,variant=reverse", "variant is 'reverse'; use standard or inverse or symmetric"),
        ("rank=4,alpha=-1", "alpha is '-1'; use a number above 0"),
        ("rank=4,alpha=nan", "alpha is 'nan'; use a number above 0"),
        ("rank=4,bias=some", "bias is 'some'; use none or all"),
    ],
)
def test_what_is_no_specification_is_said_in_one_sentence(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        parse_lora(text)
    assert "\n" not in str(error.value)
