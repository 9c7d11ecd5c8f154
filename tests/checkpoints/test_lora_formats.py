"""docs/howto/lora.md's table: every format and kind of LoRA against peft on the stock module."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from dyexport.backbones.base import Preset
from dyexport.backbones.flux.preset import FluxPreset
from dyexport.checkpoints.static import adopt_static, load_static, meta_backbone, save_static
from dyexport.checkpoints.user_lora import UserLora
from dyexport.lora import LoraFile
from dyexport.models.random_weights import random_backbone
from dyexport.presets import get_preset
from tests.checkpoints import lora_styles as styles
from tests.pipeline.tiny import TINY

FLUX = get_preset("flux-tiny")
LATTE = get_preset("latte-tiny")
DOUBLE = r"transformer_blocks\.\d+\."
ATTENTION = rf"{DOUBLE}attn\.(to_q|to_k|to_v|add_q_proj|add_k_proj|add_v_proj|to_out\.0|to_add_out)"
OWN_NAMES = r".*(to_q|to_out\.0|net\.0\.proj|net\.2|proj_mlp|norm\w*\.linear|linear_1|linear_2|proj_out|x_embedder)"
FOREIGN_NAMES = "|".join(
    (
        ATTENTION,
        rf"{DOUBLE}(ff|ff_context)\.net\.(0\.proj|2)",
        r".*(norm\w*\.linear|proj_out|linear_1|linear_2|x_embedder|context_embedder)",
    )
)
TARGETS = {FLUX.name: OWN_NAMES, TINY.name: r".*(to_q|to_out\.0|net\.0\.proj|norm1\.linear|proj_out_[12])"}
TARGETS[LATTE.name] = r".*(to_q|to_out\.0|net\.0\.proj|linear_1|adaln_single\.linear|proj_out)"
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha_pattern": {"alpha_pattern": {"to_q": 32, r"transformer_blocks\.0\..*": 2}},
    "rank_pattern": {"rank_pattern": {r".*net\.\d": 2, "to_q": 6}, "alpha_pattern": {"net.0.proj": 3}},
    "rslora": {"use_rslora": True, "rank_pattern": {"to_q": 2}},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "eva": {"init_lora_weights": "eva"},
}
FOREIGN = (styles.kohya, styles.comfy)


def adopted(preset: Preset, root: Path, *loras: LoraFile) -> Any:
    """The static model with the LoRAs in it."""
    save_static(random_backbone(preset), root / "plain")
    adopt_static(str(root / "plain"), preset, root / "merged", loras)
    return load_static(str(root / "merged"), preset)


def assert_merged(found: nn.Module, model: Any) -> None:
    """As peft merges it, in every layer that it targets."""
    names, plain = styles.layers_of(model), dict(model.base_model.model.named_parameters())
    plain = {name.replace(".base_layer", ""): value.detach().clone() for name, value in plain.items()}
    truth = styles.merged(model).state_dict()
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, truth[name], atol=1e-6, rtol=1e-6)
    assert len(names) > 3
    for name in names:
        assert (truth[f"{name}.weight"] - plain[f"{name}.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("write", [styles.peft, styles.diffusers])
def test_peft_and_diffusers(write: styles.Writer, kind: str, tmp_path: Path) -> None:
    model = styles.adapted(FLUX, TARGETS[FLUX.name], **KINDS[kind])
    assert_merged(adopted(FLUX, tmp_path, LoraFile(file=write(model, tmp_path))), model)


@pytest.mark.parametrize("kind", ["plain", "alpha_pattern", "rank_pattern", "rslora", "dora"])
@pytest.mark.parametrize("preset", [TINY, LATTE], ids=["sit", "latte"])
def test_other_backbones(preset: Preset, kind: str, tmp_path: Path) -> None:
    model = styles.adapted(preset, TARGETS[preset.name], **KINDS[kind])
    assert_merged(adopted(preset, tmp_path, LoraFile(file=styles.peft(model, tmp_path))), model)


@pytest.mark.parametrize("write", [styles.diffusers, styles.one_trainer])
@pytest.mark.parametrize("preset", [TINY, LATTE], ids=["sit", "latte"])
def test_other_backbones_by_other_trainers(preset: Preset, write: styles.Writer, tmp_path: Path) -> None:
    model = styles.adapted(preset, TARGETS[preset.name], **KINDS["rank_pattern"])
    assert_merged(adopted(preset, tmp_path, LoraFile(file=write(model, tmp_path))), model)


def test_diffusers_with_a_text_encoder(tmp_path: Path) -> None:
    """Whose configuration is in the same header."""
    model = styles.adapted(FLUX, TARGETS[FLUX.name], **KINDS["alpha_pattern"])
    key = "text_model.encoder.layers.0.self_attn.k_proj.lora_A.weight"
    others = {"text_encoder_lora_layers": {key: torch.ones(2, 8)}, "text_encoder_lora_adapter_metadata": {"r": 2}}
    with pytest.warns(UserWarning, match=rf"text_encoder\.{key}"):
        found = adopted(FLUX, tmp_path, LoraFile(file=styles.diffusers(model, tmp_path, **others)))
    assert_merged(found, model)


@pytest.mark.parametrize("kind", ["plain", "alpha_pattern", "rank_pattern"])
def test_one_trainer(kind: str, tmp_path: Path) -> None:
    model = styles.adapted(FLUX, TARGETS[FLUX.name], **KINDS[kind])
    assert_merged(adopted(FLUX, tmp_path, LoraFile(file=styles.one_trainer(model, tmp_path))), model)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", ["plain", "alphas", "ranks"])
@pytest.mark.parametrize("write", FOREIGN)
def test_kohya_and_comfy(write: styles.Writer, kind: str, shared: bool, tmp_path: Path) -> None:
    """q, k and v are one layer there, of one A, or of three that are put together."""
    pattern = {"img": r"transformer_blocks\.0\..*", "out": "proj_out", "last": r"norm_out\.linear"}
    options: dict[str, Any] = {
        "plain": {},
        "alphas": {"alpha_pattern": {pattern["img"]: 2, pattern["out"]: 3, pattern["last"]: 1}},
        "ranks": {"rank_pattern": {pattern["img"]: 2, pattern["out"]: 3}},
    }[kind]
    model = styles.adapted(FLUX, FOREIGN_NAMES, **options)
    if shared:
        styles.share_down(model)
    assert_merged(adopted(FLUX, tmp_path, LoraFile(file=write(model, tmp_path))), model)


RANKS = {r"attn\.to_out\.0": 2, r".*\.1\.attn\.(to_|add_)[qkv].*": 3}


@pytest.mark.parametrize("options", [{}, {"rank_pattern": RANKS, "alpha_pattern": RANKS}], ids=["plain", "ranks"])
@pytest.mark.parametrize("write", [styles.comfy_peft, styles.fal, styles.xlabs, styles.ai_toolkit])
def test_those_without_alpha(write: styles.Writer, options: dict[str, Any], tmp_path: Path) -> None:
    model = styles.adapted(FLUX, ATTENTION, lora_alpha=4, **options)
    styles.share_down(model)
    assert_merged(adopted(FLUX, tmp_path, LoraFile(file=write(model, tmp_path))), model)


def test_a_dora_needs_no_configuration(tmp_path: Path) -> None:
    model = styles.adapted(FLUX, TARGETS[FLUX.name], lora_alpha=4, use_dora=True)
    assert_merged(adopted(FLUX, tmp_path, LoraFile(file=styles.ai_toolkit(model, tmp_path))), model)


def test_a_single_blocks_first_layer_is_split(tmp_path: Path) -> None:
    """At FLUX's own width, which diffusers' converter takes for granted."""
    flux = get_preset("flux")
    assert isinstance(flux, FluxPreset)
    preset, name = replace(flux, double_blocks=1, single_blocks=1), "lora_unet_single_blocks_0_linear1"
    fused = nn.ModuleDict({"linear1": nn.utils.skip_init(nn.Linear, 3072, 21504, bias=False)})
    model: Any = get_peft_model(
        fused, LoraConfig(r=2, lora_alpha=3, target_modules=["linear1"], init_lora_weights=False)
    )
    state = {f"{name}.alpha": torch.tensor(3.0)}
    for kind, part in (("down", "A"), ("up", "B")):
        state[f"{name}.lora_{kind}.weight"] = model.state_dict()[f"base_model.model.linear1.lora_{part}.default.weight"]
    save_file(state, tmp_path / "lora.safetensors")
    lora = UserLora(
        LoraFile(file=tmp_path / "lora.safetensors"), preset, meta_backbone(preset, preset.transformer_config())
    )
    change = model.base_model.model.linear1.get_delta_weight("default").detach()
    rows = dict(
        zip(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), change.split([3072, 3072, 3072, 12288]), strict=True)
    )
    for layer, expected in rows.items():
        module = f"single_transformer_blocks.0.{layer}"
        zeros = {"weight": torch.zeros_like(expected), "bias": torch.zeros(len(expected))}
        torch.testing.assert_close(lora.merged(module, zeros)["weight"], expected, atol=1e-6, rtol=1e-6)
