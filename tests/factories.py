"""Small models that behave like large ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal

import numpy as np
import torch

from dyexport.backbones.base import Preset
from dyexport.backbones.dit.preset import DiTPreset
from dyexport.backbones.latte.preset import LattePreset
from dyexport.bundle.spec import ModelSpec
from dyexport.flops import FlopsModel, RouterFlops
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.importance import order_of, unit_importance
from dyexport.models.inputs import NoisedInputs
from dyexport.models.random_weights import random_dynamic
from dyexport.presets import PRESETS
from dyexport.slicing import slicer


def tiny_preset(backbone: str = "dit") -> Preset:
    """A preset that runs in milliseconds: one that is made for tests, or the backbone's smallest."""
    if backbone in _TINY:
        return _TINY[backbone]
    return min((p for p in PRESETS.values() if p.backbone == backbone), key=lambda preset: preset.parameters)


def _tiny_dit(backbone: Literal["dit", "sit"]) -> DiTPreset:
    return DiTPreset(
        name=f"{backbone}-tiny",
        backbone=backbone,
        layers=3,
        hidden_size=32,
        heads=4,
        patch_size=2,
        sample_size=8,
        in_channels=2,
        learn_sigma=True,
        classes=10,
    )


_TINY: dict[str, Preset] = {
    "dit": _tiny_dit("dit"),
    "sit": _tiny_dit("sit"),
    "latte": LattePreset(
        name="latte-tiny",
        hidden_size=32,
        heads=4,
        pairs=2,
        sample_size=4,
        frames=3,
        in_channels=2,
        text_tokens=5,
        caption_size=6,
    ),
}


def tiny_model(backbone: str = "dit", *, tokens: bool = True, seed: int = 0) -> DynamicTransformer:
    return random_dynamic(tiny_preset(backbone), tokens=tokens, seed=seed)


def spec_of(preset: Preset) -> ModelSpec:
    return slicer.spec_of(preset, preset.transformer_config())


def uniform_flops(*, depth: int, attention: float, mlp: float, static: float = 0.0, router: float = 0.0) -> FlopsModel:
    """Blocks that all cost the same, text tokens none."""
    blocks = np.ones(depth)
    return FlopsModel(
        attention=attention * blocks,
        attention_tokens=0 * blocks,
        mlp=0 * blocks,
        mlp_tokens=mlp * blocks,
        routers={"published": RouterFlops(0 * blocks, router * blocks)},
        low_rank=0 * blocks,
        static=static,
        conditioning=0.0,
    )


def random_timesteps(preset: Preset, count: int, seed: int = 0) -> list[float]:
    """Uniform over the whole range, at fp32 resolution."""
    start, end = preset.timestep_range
    draws = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return (start + draws * (end - start)).tolist()


@cache
def shared_tiny_model(backbone: str = "dit", tokens: bool = True) -> DynamicTransformer:
    """One model for tests that only read it."""
    return tiny_model(backbone, tokens=tokens)


def rank_units(model: DynamicTransformer, inputs: NoisedInputs, timesteps: Sequence[float]) -> None:
    """Reorder the units of a model in memory, most important first."""
    order = order_of(*unit_importance(model, inputs, timesteps))
    for block in range(model.depth):
        model.adapter.permute_units(model.backbone, block, order["heads"][block], order["groups"][block])
    model.order = order
