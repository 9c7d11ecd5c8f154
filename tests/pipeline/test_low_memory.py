"""Fine-tuning on a base in lower precision, end to end: the bundle is the dequantized base with its updates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dyexport.backbones import get_conditioning
from dyexport.checkpoints.dynamic import load_dynamic
from dyexport.checkpoints.static import load_static, save_static
from dyexport.errors import UsageError
from dyexport.lora import LoraSpec
from dyexport.models.frozen_base import FORMATS
from dyexport.models.random_weights import random_backbone
from dyexport.pipeline.export_stages import _own_dense
from dyexport.pipeline.settings import BuildSettings
from dyexport.pipeline.stage_settings import dynamic_settings
from dyexport.verification.settings import VerifySettings
from dyexport.verification.verify import find_reference, verify_bundle
from tests.factories import spec_of
from tests.pipeline.tiny import build, redone, shallow, tiny_settings

SPEC = LoraSpec(rank=2, experts=3, alpha=4)
FLUX = shallow("flux-tiny")


def trained_settings(root: Path, **values: Any) -> BuildSettings:
    """Settings of a short fine-tuning of a shallow FLUX by TD-LoRA, in four micro-batches a step."""
    preset = replace(FLUX, side=4, text_tokens=5)
    save_static(random_backbone(preset, 0), root / "checkpoint")
    generator = torch.Generator().manual_seed(0)
    rows = {"latents": torch.randn(8, *preset.latent_shape, generator=generator)}
    conditions = get_conditioning(preset).random(8, generator)
    rows |= {column.name: conditions[column.argument] for column in get_conditioning(preset).columns}
    (root / "data").mkdir()
    save_file(rows, root / "data" / "a.safetensors")
    schedule = replace(preset.recipe.finetune_lora, steps=6, batch_size=4)
    short = replace(preset, recipe=replace(preset.recipe, finetune_lora=schedule))
    paths = {"checkpoint": str(root / "checkpoint"), "data": str(root / "data"), "random_weights": False}
    return tiny_settings(root, model=short, td_lora=SPEC, **paths, **values)


@pytest.mark.build
def test_a_bundle_of_a_4_bit_base_verifies(tmp_path: Path) -> None:
    options = {"base_precision": "nf4", "checkpointing": "on", "micro_batch": 1}
    settings = trained_settings(tmp_path, **options)
    bundle = build(settings)
    assert verify_bundle(bundle.root, VerifySettings(timesteps=3)).passed
    model, preset = load_dynamic(find_reference(bundle))
    levels = {name: value for name, value in model.backbone.state_dict().items() if name.endswith("attn.to_q.weight")}
    static = load_static(str(settings.work / "static"), preset).state_dict()
    for name, value in levels.items():
        stored = FORMATS["nf4"].pack(value)  # its values are those of the format
        torch.testing.assert_close(FORMATS["nf4"].unpack(stored, value.shape).float(), value, rtol=0.01, atol=1e-6)
        assert not torch.equal(value, static[name])
    assert redone(replace(settings, checkpointing="off", micro_batch=2)) == set()


def test_the_dense_network_keeps_the_weights_that_the_base_had(tmp_path: Path) -> None:
    settings = trained_settings(tmp_path)
    spec = spec_of(FLUX).model_copy(update={"td_lora": SPEC})
    assert [
        _own_dense(replace(settings, base_precision=base, precision=precision), spec)
        for base, precision in (("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"), ("nf4", "bf16"))
    ] == ["nothing", "nothing", "everything", "everything"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base_precision": "nf4", "finetune_steps": 0, "td_lora": None}, "--base-precision is for fine-tuning"),
        ({"micro_batch": 2, "finetune_steps": 0, "td_lora": None}, "--micro-batch is for fine-tuning"),
        ({"micro_batch": 3}, "--micro-batch 3 does not divide the batch of 4"),
        ({"base_precision": "nf4", "td_lora": None}, "--base-precision nf4 is of a frozen base"),
        ({"base_precision": "int3"}, "--base-precision is 'int3'; use fp32, bf16, int8 or nf4"),
    ],
)
def test_what_has_no_effect_is_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    settings = trained_settings(tmp_path)
    with pytest.raises(UsageError, match=message):
        replace(settings, **values)


def test_stages_are_made_of_what_changes_weights(tmp_path: Path) -> None:
    plain = trained_settings(tmp_path)
    assert dynamic_settings(plain) == dynamic_settings(replace(plain, checkpointing="on", micro_batch=1))
    assert dynamic_settings(plain) != dynamic_settings(replace(plain, base_precision="int8"))
    assert dynamic_settings(plain) != dynamic_settings(replace(plain, optimizer="adamw-8bit"))
    assert "optimizer" not in dynamic_settings(plain)
    assert "base_precision" not in dynamic_settings(plain)
