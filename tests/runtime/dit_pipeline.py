"""diffusers' ``DiTPipeline`` around a model of pixels, which has no VAE."""

from __future__ import annotations

import torch
from diffusers import DiTPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput

from dyexport.backbones import get_pipeline
from dyexport.bundle.spec import ModelSpec
from dyexport.runtime.transformer import offloading_placeholder


class PixelVAE(torch.nn.Module):
    """Stands in for ``vae`` where latents are pixels already."""

    def __init__(self) -> None:
        super().__init__()
        self.config = FrozenDict(scaling_factor=1.0)
        self.placeholder = offloading_placeholder()

    @property
    def dtype(self) -> torch.dtype:
        return self.placeholder.dtype

    @property
    def device(self) -> torch.device:
        return self.placeholder.device

    def decode(self, latents: torch.Tensor) -> DecoderOutput:
        return DecoderOutput(sample=latents)


def pixel_pipeline(transformer: torch.nn.Module, spec: ModelSpec, scheduler: str = "ddim") -> DiTPipeline:
    made = get_pipeline(spec.backbone).scheduler(spec, scheduler)
    return DiTPipeline(transformer=transformer, vae=PixelVAE(), scheduler=made)
