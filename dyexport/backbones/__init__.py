"""The backbones that dyexport makes dynamic: one folder each, whose modules are found by name. Imports no torch."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from dyexport.errors import UsageError

if TYPE_CHECKING:
    from dyexport.backbones.base import Adapter, Conditioning, Preset, PromptPipeline, Slicer
    from dyexport.runtime.transformer import BundleTransformer

BACKBONES = ("dit", "sit", "flux", "latte")
_SAME_NETWORK = {"sit": "dit"}
"""Backbones that differ from another one in their objective only, and share its folder."""


def part(backbone: str, role: str) -> ModuleType:
    """Import the module of a backbone that plays a role, such as ``masked``; ``base.py`` lists the roles.

    Raises ``UsageError`` for an unknown backbone.
    """
    if backbone not in BACKBONES:
        raise UsageError(f"unknown backbone {backbone!r}; known: {', '.join(BACKBONES)}")
    return import_module(f"{__name__}.{_SAME_NETWORK.get(backbone, backbone)}.{role}")


def get_adapter(backbone: str) -> Adapter:
    """Return what makes a stock module dynamic."""
    adapter: Adapter = part(backbone, "masked").ADAPTER
    return adapter


def get_conditioning(preset: Preset) -> Conditioning:
    """Return what a preset's network takes next to latents and t."""
    conditioning: Conditioning = part(preset.backbone, "conditions").Conditioning(preset)
    return conditioning


def get_slicer(backbone: str) -> Slicer:
    """Return what cuts slim networks out of a dense model."""
    slicer: Slicer = part(backbone, "cut")
    return slicer


def get_stand_in(backbone: str) -> type[BundleTransformer]:
    """Return the class with the ``forward`` of a backbone's diffusers transformer."""
    stand_in: type[BundleTransformer] = part(backbone, "stand_in").StandIn
    return stand_in


def get_pipeline(backbone: str) -> PromptPipeline:
    """Return what sampling from prompts must know of a backbone's diffusers pipeline."""
    pipeline: PromptPipeline = part(backbone, "pipeline").PIPELINE
    return pipeline
