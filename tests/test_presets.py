"""Presets against the modules diffusers builds from them, on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from dyexport.backbones import get_adapter
from dyexport.errors import UsageError
from dyexport.presets import PRESETS, get_preset
from tests.factories import spec_of


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_of_the_module(name: str) -> None:
    preset = PRESETS[name]
    with torch.device("meta"):
        module = get_adapter(preset.backbone).build(preset.transformer_config())
    assert preset.parameters == sum(parameter.numel() for parameter in module.parameters())
    assert preset.depth == len(get_adapter(preset.backbone).blocks(module))


def test_flux_is_the_published_one() -> None:
    """Except for guidance, diffusers' own defaults are FLUX.1's."""
    with torch.device("meta"):
        config: Any = FluxTransformer2DModel(guidance_embeds=True).config
    ours = PRESETS["flux"].transformer_config()
    assert {name: list(v) if isinstance(v := config[name], tuple) else v for name in ours} == ours
    sizes = {"flux": 11.90, "flux-schnell": 11.89, "flux-lite": 8.16}
    for name, billions in sizes.items():
        assert PRESETS[name].parameters / 1e9 == pytest.approx(billions, abs=0.01)


def test_latte_is_the_published_one() -> None:
    """Weights of maxin-cn/Latte-1: 28 pairs of blocks, 16 frames of 64 x 64 latents."""
    preset = PRESETS["latte"]
    assert preset.parameters / 1e9 == pytest.approx(1.057, abs=0.001)
    assert (preset.depth, preset.latent_shape, preset.tokens) == (56, (4, 16, 64, 64), 16384)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("flux-tniy", "flux-tiny"),
        ("flux-dev", "flux"),
        ("FLUX.1-dev", "flux"),
        ("black-forest-labs/FLUX.1-schnell", "flux-schnell"),
        ("DiT-XL/2", "dit-xl-2"),
        ("facebook/DiT-XL-2-256", "dit-xl-2"),
        ("qwen_image", "qwen-image"),
    ],
)
def test_unknown_names_come_with_a_hint(name: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean '{meant}'"):
        get_preset(name)


@pytest.mark.parametrize("name", PRESETS)
def test_a_bundle_knows_the_latents_of_every_backbone(name: str) -> None:
    preset = get_preset(name)
    spec = spec_of(preset)
    assert spec.latent_shape == preset.latent_shape
    assert spec.frames == getattr(preset, "frames", None)
