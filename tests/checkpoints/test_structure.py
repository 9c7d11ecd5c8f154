"""The structure of a model comes from its checkpoint, whatever its sizes; what cannot be represented is named."""

from __future__ import annotations

import inspect
import json
import warnings
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, LatteTransformer3DModel

from dyexport.backbones import get_adapter, part
from dyexport.checkpoints.static import save_static
from dyexport.checkpoints.structure import resolve_preset
from dyexport.errors import CheckpointError, DyexportWarning, UsageError
from dyexport.models.random_weights import random_backbone
from dyexport.pipeline.settings import BuildSettings
from dyexport.presets import PRESETS, get_preset, preset_of
from dyexport.slicing.slicer import spec_of
from dyexport.verification.settings import VerifySettings
from dyexport.verification.verify import verify_bundle
from tests.pipeline.tiny import build

STOCK = {"dit": DiTTransformer2DModel, "flux": FluxTransformer2DModel, "latte": LatteTransformer3DModel}
FLUX = dict(get_preset("flux-tiny").transformer_config())
DIT: dict[str, Any] = {
    "num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 3, "out_channels": 6, "num_layers": 2,
    "sample_size": 12, "patch_size": 3, "num_embeds_ada_norm": 7, "norm_eps": 1e-4,
}  # fmt: skip
LATTE = {**get_preset("latte-tiny").transformer_config(), "num_layers": 1, "out_channels": 4, "sample_size": 4}
STRUCTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "dit": ("dit", DIT),
    "dit-without-sigma": ("dit", {**DIT, "out_channels": None, "patch_size": 2}),
    "fill": ("flux", {**FLUX, "in_channels": 24, "out_channels": 8, "num_layers": 1, "num_single_layers": 1}),
    "canny": ("flux", {**FLUX, "in_channels": 16, "out_channels": 8, "num_layers": 1, "num_single_layers": 1}),
    "pruned": ("flux", {**FLUX, "num_layers": 1, "num_single_layers": 2, "guidance_embeds": False}),
    "latte": ("latte", LATTE),
}


def write(backbone: str, config: dict[str, Any], directory: Path) -> Path:
    """Write a checkpoint by diffusers itself."""
    torch.manual_seed(0)
    model: Any = STOCK[backbone](**config)
    if backbone == "dit":
        for block in model.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    model.save_pretrained(directory, safe_serialization=True)
    return directory


@pytest.mark.parametrize("backbone", STOCK)
def test_defaults_are_those_of_diffusers(backbone: str) -> None:
    parameters = inspect.signature(STOCK[backbone].__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    assert defaults == import_module(f"dyexport.backbones.{backbone}.preset").DEFAULTS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_that_of_its_own_config(name: str) -> None:
    preset = PRESETS[name]
    config = {"_class_name": preset.stock, **preset.transformer_config()}
    assert preset.with_config(config) is preset
    made = part(preset.backbone, "preset").PRESETS[0].from_config(config, "mine")
    assert made.transformer_config() == preset.transformer_config()
    assert preset_of(spec_of(preset, config)) == preset


@pytest.mark.parametrize("name", STRUCTURES)
def test_any_structure_is_built_without_a_name(name: str, tmp_path: Path) -> None:
    backbone, config = STRUCTURES[name]
    source = write(backbone, config, tmp_path / f"my-{name}" / "transformer")
    preset = resolve_preset(None, str(source.parent))
    assert (preset.name, preset.backbone) == (f"my-{name}", backbone)
    with torch.device("meta"):
        module = get_adapter(backbone).build(preset.transformer_config())
    assert preset.parameters == sum(parameter.numel() for parameter in module.parameters())
    settings = BuildSettings(
        checkpoint=str(source.parent), budget=0.6, finetune_steps=0, engines=1, baseline=False,
        out=tmp_path / "bundle", work=tmp_path / "work",
    )  # fmt: skip
    small = preset.with_tokens(16) if backbone == "flux" else preset
    bundle = build(settings if small == preset else replace(settings, model=replace(small, text_tokens=8)))
    assert bundle.manifest.model.name == f"my-{name}"
    assert verify_bundle(bundle.root, VerifySettings(timesteps=4)).passed


@pytest.mark.parametrize(
    ("backbone", "change", "message"),
    [
        ("dit", {"norm_type": "layer_norm"}, "norm_type is 'layer_norm'; supported: 'ada_norm_zero'"),
        ("dit", {"attention_bias": False}, "attention_bias is False; supported: True"),
        ("dit", {"out_channels": 5}, "out_channels is 5; supported: 3, as in_channels, or twice that"),
        ("dit", {"patch_size": 5}, "patch_size is 5; supported: one that divides sample_size, 12"),
        ("flux", {"axes_dims_rope": [8, 8]}, "axes_dims_rope is .*three even numbers that add up to"),
        ("flux", {"out_channels": 99}, "out_channels is 99; supported: at most in_channels, 16"),
        ("latte", {"caption_channels": None}, "caption_channels is None; .* diffusers' Latte takes no class labels"),
        ("latte", {"activation_fn": "geglu"}, "activation_fn is 'geglu'; supported: 'gelu-approximate'"),
    ],
)
def test_what_cannot_be_represented_is_named(
    backbone: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = {"dit": DIT, "flux": FLUX, "latte": LATTE}[backbone]
    stored = {"_class_name": STOCK[backbone].__name__, **config, **change}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match=rf"config\.json: {message}"):
        resolve_preset(None, str(tmp_path))


def test_a_name_and_a_checkpoint_of_another_class_exclude_each_other(tmp_path: Path) -> None:
    write("dit", DIT, tmp_path)
    with pytest.raises(UsageError, match="holds a DiTTransformer2DModel, and flux is a FluxTransformer2DModel"):
        resolve_preset("flux", str(tmp_path))


def test_the_structure_of_the_checkpoint_goes_before_that_of_the_name(tmp_path: Path) -> None:
    write("dit", DIT, tmp_path / "mine")
    with pytest.warns(DyexportWarning, match=r"num_attention_heads is 4, sit-s-2 has 6; the model is built as mine"):
        preset = resolve_preset("sit-s-2", str(tmp_path / "mine"))
    assert (preset.name, preset.backbone, preset.classes) == ("mine", "sit", 7)


def test_what_a_configuration_does_not_tell_is_assumed_with_a_warning(tmp_path: Path) -> None:
    """And a name decides."""
    write("dit", DIT, tmp_path / "mine")
    said = r"json fits dit and sit; the model is built as dit, objective ddpm; for sit, objective flow, give --model"
    with pytest.warns(DyexportWarning, match=rf"{said} sit-s-2$"):
        assert resolve_preset(None, str(tmp_path / "mine")).backbone == "dit"
    write("dit", get_preset("sit-digits").transformer_config(), tmp_path / "small")
    with pytest.warns(DyexportWarning, match=rf"{said} sit-digits$"):
        resolve_preset(None, str(tmp_path / "small"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_preset("sit-digits", str(tmp_path / "small")).backbone == "sit"
        write("flux", FLUX, tmp_path / "flux")
        resolve_preset(None, str(tmp_path / "flux"))


def test_a_name_is_kept_where_the_structure_is_its_own(tmp_path: Path) -> None:
    preset = get_preset("dit-digits")
    save_static(random_backbone(preset), tmp_path / "dit-digits")
    assert resolve_preset("sit-digits", str(tmp_path / "dit-digits")) is get_preset("sit-digits")
    assert resolve_preset(None, str(tmp_path / "dit-digits")) == preset
    (tmp_path / "dit-digits").rename(tmp_path / "other")
    assert resolve_preset(None, str(tmp_path / "other")) == replace(preset, name="other")


def test_neither_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"no model is given; give --model, such as .*, or a --checkpoint"):
        resolve_preset(None, None)


def test_a_class_that_has_no_backbone_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(CheckpointError, match=r"config\.json: _class_name is 'UNet2DConditionModel'; supported: DiT"):
        resolve_preset(None, str(tmp_path))
