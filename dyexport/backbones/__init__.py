"""The backbones that dyexport makes dynamic: one folder each, whose modules are found by name. Imports no torch."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from dyexport.errors import UsageError

if TYPE_CHECKING:
    from dyexport.backbones.autoencoders import ScaledLatents
    from dyexport.backbones.base import Adapter, Conditioning, EngineSizes, Preset, SamplingDefaults, Slicer
    from dyexport.backbones.sampling import SamplingPipeline
    from dyexport.bundle.spec import ModelSpec
    from dyexport.runtime.transformer import BundleTransformer

BACKBONES = ("dit", "sit", "flux", "latte", "qwen_image")
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
    """Return the adapter that makes a stock module dynamic."""
    adapter: Adapter = part(backbone, "masked").ADAPTER
    return adapter


def get_conditioning(preset: Preset) -> Conditioning:
    """Return the conditioning of a preset's network: its inputs other than latents and t."""
    conditioning: Conditioning = part(preset.backbone, "conditions").Conditioning(preset)
    return conditioning


def get_latent_format(preset: Preset) -> ScaledLatents:
    """Return how pictures become latents of a preset's model. Raises ``DataError`` if pictures alone cannot."""
    latents: ScaledLatents = part(preset.backbone, "latents").latent_format(preset)
    return latents


def get_slicer(backbone: str) -> Slicer:
    """Return the functions that cut slim networks out of a dense model."""
    slicer: Slicer = part(backbone, "cut")
    return slicer


def get_stand_in(backbone: str) -> type[BundleTransformer]:
    """Return the class with the ``forward`` of a backbone's diffusers transformer."""
    stand_in: type[BundleTransformer] = part(backbone, "stand_in").StandIn
    return stand_in


def get_pipeline(backbone: str) -> SamplingPipeline:
    """Return the sampling pipeline of a backbone's bundles."""
    pipeline: SamplingPipeline = part(backbone, "pipeline").PIPELINE
    return pipeline


def get_engine_sizes(backbone: str) -> EngineSizes:
    """Return the functions that give the sizes of a backbone's TensorRT engines."""
    sizes: EngineSizes = part(backbone, "engine_sizes")
    return sizes


def known_preset(spec: ModelSpec) -> Preset | None:
    """Return the preset of a bundle's model; None for a model that dyexport does not know by name."""
    presets: tuple[Preset, ...] = part(spec.backbone, "preset").PRESETS
    return next((preset for preset in presets if preset.name == spec.name), None)


def sampling_defaults(spec: ModelSpec) -> SamplingDefaults:
    """Return the sampling defaults of a bundle's model: those of its preset, or of its configuration."""
    presets: tuple[Preset, ...] = part(spec.backbone, "preset").PRESETS
    configured = presets[0].sampling_of(spec.config)
    preset = known_preset(spec)
    if preset is None or (preset.sampling.guidance is None) != (configured.guidance is None):
        return configured
    return preset.sampling
