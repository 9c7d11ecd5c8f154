"""A user's LoRA against what diffusers and peft make of the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from dyexport.architectures import Preset
from dyexport.errors import CheckpointError
from dyexport.lora import LoraFile
from dyexport.models.checkpoints import adopt_static, load_static, save_static
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.dynamic_checkpoints import save_dynamic
from dyexport.models.importance import rank_units
from dyexport.models.inputs import NoisedInputs
from dyexport.models.random_weights import random_backbone, random_dynamic
from dyexport.models.user_lora import UserLora
from dyexport.presets import get_preset
from tests.build.tiny import TINY

FLUX = get_preset("flux-tiny")
TARGETS = {TINY.name: ["to_q", "to_out.0", "net.0.proj"], FLUX.name: ["to_q", "to_add_out", "proj_mlp", "proj_out"]}


def config(preset: Preset) -> LoraConfig:
    return LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS[preset.name], init_lora_weights=False)


def adopted(preset: Preset, root: Path, file: Path, source: Path | None = None, scale: float = 1.0) -> Any:
    """The static model with the LoRA in it."""
    if source is None:
        source = root / "plain"
        save_static(random_backbone(preset), source)
    adopt_static(str(source), preset, root / "merged", [LoraFile(file=file, scale=scale)])
    return load_static(str(root / "merged"), preset)


def assert_same(found: torch.nn.Module, expected: torch.nn.Module, base: torch.nn.Module) -> None:
    moved = 0
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, atol=1e-6, rtol=1e-5)
        moved += not torch.allclose(value, base.state_dict()[name], atol=1e-4)
    assert moved > 3


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_as_peft_writes_it(scale: float, tmp_path: Path) -> None:
    adapted = get_peft_model(random_backbone(TINY), config(TINY))
    adapted.save_pretrained(tmp_path / "peft")
    if scale != 1.0:
        for module in adapted.modules():
            if hasattr(module, "scale_layer"):
                module.scale_layer(scale)
    found = adopted(TINY, tmp_path, tmp_path / "peft" / "adapter_model.safetensors", scale=scale)
    assert_same(found, adapted.merge_and_unload(), random_backbone(TINY))


@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_as_diffusers_writes_it_for_flux(scale: float, tmp_path: Path) -> None:
    stock: Any = random_backbone(FLUX)
    stock.add_adapter(config(FLUX))
    stock.save_lora_adapter(tmp_path / "lora")
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    again: Any = random_backbone(FLUX)
    again.load_lora_adapter(str(tmp_path / "lora"), weight_name=file.name, prefix=None)
    again.fuse_lora(lora_scale=scale)
    again.unload_lora()
    assert_same(adopted(FLUX, tmp_path, file, scale=scale), again, random_backbone(FLUX))


def test_in_a_fine_tuned_checkpoint_units_stand_in_another_order(tmp_path: Path) -> None:
    """A LoRA made for the published model is the same function in the model whose units were ranked."""
    adapted = get_peft_model(random_backbone(TINY), config(TINY))
    adapted.save_pretrained(tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    model: DynamicTransformer = random_dynamic(TINY)
    rank_units(model, NoisedInputs(preset=TINY, batch_size=2), [0.3, 0.8])
    save_dynamic(model, tmp_path / "dynamic", TINY)
    assert model.order is not None
    assert not torch.equal(model.order["heads"][0], torch.arange(TINY.heads))
    inputs = NoisedInputs(preset=TINY, batch_size=2).at(0.4)
    with torch.no_grad():
        expected = adapted.merge_and_unload()(**inputs).sample
        found = adopted(TINY, tmp_path, file, source=tmp_path / "dynamic")(**inputs).sample
        plain = random_backbone(TINY)(**inputs).sample
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (expected - plain).abs().max() > 1e-3


NAME = "transformer_blocks.0.attn1.to_q"


def factors(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{NAME}.lora_A.weight": torch.ones(2, 48), f"{NAME}.lora_B.weight": torch.ones(48, 2), **changes}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no LoRA"),
        (factors(**{"text_encoder.head": torch.ones(1)}), r"text_encoder\.head is no factor .* give one of sit-tiny"),
        ({f"{NAME}.lora_A.weight": torch.ones(2, 48)}, "needs two matrices, A and B"),
        (factors(**{f"{NAME}.lora_B.weight": torch.ones(40, 2)}), r"\(40, 2\) @ \(2, 48\), sit-tiny has \(48, 48\)"),
        (factors(**{f"{NAME}.lora_B.weight": torch.ones(48, 3)}), r"\(48, 3\) @ \(2, 48\)"),
        (
            {"x.lora_A.weight": torch.ones(2, 48), "x.lora_B.weight": torch.ones(48, 2)},
            r"sit-tiny has no x\.weight; give a LoRA made for this model",
        ),
    ],
)
def test_what_does_not_fit_is_named(tensors: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=message) as error:
        adopted(TINY, tmp_path, tmp_path / "lora.safetensors")
    assert "\n" not in str(error.value)
    assert "lora.safetensors" in str(error.value)


def test_what_is_no_plain_lora_is_named(tmp_path: Path) -> None:
    (tmp_path / "lora.bin").touch()
    with pytest.raises(CheckpointError, match=r"lora\.bin is not a file of safetensors"):
        UserLora(tmp_path / "lora.bin", TINY)
    (tmp_path / "damaged.safetensors").write_bytes(b"12345678")
    with pytest.raises(CheckpointError, match="is damaged"):
        UserLora(tmp_path / "damaged.safetensors", TINY)
    save_file(factors(), tmp_path / "lora.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"use_dora": True}))
    with pytest.raises(CheckpointError, match="DoRA"):
        UserLora(tmp_path / "lora.safetensors", TINY)


def test_an_alpha_beside_the_factors_counts(tmp_path: Path) -> None:
    save_file(factors(**{f"{NAME}.alpha": torch.tensor(1.0)}), tmp_path / "lora.safetensors")
    found = adopted(TINY, tmp_path, tmp_path / "lora.safetensors")
    change = found.get_submodule(NAME).weight - random_backbone(TINY).get_submodule(NAME).weight
    torch.testing.assert_close(change, torch.full((48, 48), 2 * 1.0 / 2), atol=1e-6, rtol=1e-5)
