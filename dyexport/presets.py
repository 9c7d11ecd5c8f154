"""The models dyexport knows by name, at their published sizes. Imports no torch."""

from __future__ import annotations

import difflib
from typing import Literal

from dyexport.architectures import DiTPreset, FluxPreset, LattePreset, Preset
from dyexport.errors import UsageError

_SIZES = {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)}


def _imagenet(backbone: Literal["dit", "sit"], size: str, sample_size: int) -> DiTPreset:
    depth, hidden_size, heads = _SIZES[size]
    pixels = sample_size * 8
    return DiTPreset(
        name=f"{backbone}-{size}-2" + ("-512" if pixels == 512 else ""),
        backbone=backbone,
        layers=depth,
        hidden_size=hidden_size,
        heads=heads,
        patch_size=2,
        sample_size=sample_size,
        in_channels=4,
        learn_sigma=True,
        engines=8 if size in ("s", "b") else 4,
        hub_id=f"facebook/DiT-XL-2-{pixels}" if (backbone, size) == ("dit", "xl") else None,
        about=f"{'DiT' if backbone == 'dit' else 'SiT'}-{size.upper()}/2, ImageNet, {pixels} px",
    )


def _digits(backbone: Literal["dit", "sit"], suffix: str = "", *, hidden_size: int = 64, about: str) -> DiTPreset:
    return DiTPreset(
        name=f"{backbone}-digits{suffix}",
        backbone=backbone,
        layers=4,
        hidden_size=hidden_size,
        heads=hidden_size // 16,
        patch_size=1,
        sample_size=8,
        in_channels=1,
        learn_sigma=False,
        classes=10,
        pixel_space=True,
        about=f"scikit-learn's handwritten digits, 8 x 8 pixels, {about}",
    )


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        *(_imagenet("dit", size, 32) for size in _SIZES),
        _imagenet("dit", "xl", 64),
        *(_imagenet("sit", size, 32) for size in _SIZES),
        _imagenet("sit", "xl", 64),
        _digits("dit", about="trains from scratch in minutes on a CPU"),
        _digits("sit", about="trains from scratch in minutes on a CPU"),
        _digits("sit", "-wide", hidden_size=128, about="with width to spare"),
        FluxPreset(name="flux", hub_id="black-forest-labs/FLUX.1-dev", about="FLUX.1-dev, guidance-distilled"),
        FluxPreset(
            name="flux-schnell",
            text_tokens=256,
            guidance=None,
            shifted=False,
            hub_id="black-forest-labs/FLUX.1-schnell",
            about="FLUX.1-schnell, 1 to 4 steps",
        ),
        FluxPreset(
            name="flux-lite",
            double_blocks=8,
            hub_id="Freepik/flux.1-lite-8B",
            about="FLUX.1-lite 8B, guidance-distilled",
        ),
        FluxPreset(
            name="flux-tiny",
            hidden_size=128,
            heads=4,
            in_channels=16,
            double_blocks=2,
            single_blocks=3,
            side=8,
            text_tokens=16,
            joint_size=64,
            pooled_size=32,
            rope_axes=(8, 12, 12),
            about="FLUX in small, for trying things out on a CPU",
        ),
        LattePreset(name="latte", hub_id="maxin-cn/Latte-1", about="Latte-1, text to video, 16 frames of 512 px"),
        LattePreset(
            name="latte-tiny",
            hidden_size=128,
            heads=4,
            pairs=2,
            sample_size=8,
            frames=4,
            text_tokens=8,
            caption_size=32,
            about="Latte in small, for trying things out on a CPU",
        ),
    )
}


def get_preset(name: str) -> Preset:
    """The preset called ``name``; raises ``UsageError`` naming the nearest known one."""
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(PRESETS)}"
    raise UsageError(f"unknown model {name!r}; {hint}")
