"""Latents that were encoded are decoded to what the VAE itself makes of a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dyexport.backbones import get_latent_format
from dyexport.encoding.decoding import PictureDecoder
from dyexport.encoding.settings import find_vae
from dyexport.errors import CheckpointError, DataError
from dyexport.presets import get_preset
from tests.pipeline.tiny_pipeline import save_qwen_image_pipeline, small_vae

SIDE = 32


def reconstructed(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Encode and decode pixels (B, 3, H, W) by the VAE alone."""
    videos = pixels.unsqueeze(2) if "temperal_downsample" in vae.config else pixels
    with torch.no_grad():
        decoded: torch.Tensor = vae.decode(vae.encode(videos).latent_dist.mode()).sample
    return decoded.reshape(pixels.shape).clamp(-1, 1)


@pytest.mark.parametrize("model", ["dit-xl-2", "flux-tiny"])
def test_decoding_undoes_encoding(model: str, tmp_path: Path) -> None:
    vae = small_vae(scaling_factor=0.5, shift_factor=0.25)
    vae.save_pretrained(tmp_path / "vae")
    check(model, vae, PictureDecoder(get_preset(model), find_vae(str(tmp_path / "vae"), None)))


def test_decoding_undoes_normalization_by_channel(tmp_path: Path) -> None:
    from diffusers import QwenImagePipeline

    pipeline = save_qwen_image_pipeline(tmp_path)
    model = "qwen-image-tiny"
    check(
        model,
        QwenImagePipeline.from_pretrained(pipeline).vae,
        PictureDecoder(get_preset(model), find_vae(None, str(pipeline))),
    )


def check(model: str, vae: Any, decoder: PictureDecoder) -> None:
    pixels = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = get_latent_format(get_preset(model)).encode(vae, pixels)
    torch.testing.assert_close(decoder(latents), reconstructed(vae, pixels), atol=1e-4, rtol=1e-4)


def test_pixels_are_as_they_are() -> None:
    decoder = PictureDecoder(get_preset("sit-digits"), None)
    decoder.open()
    assert decoder(torch.tensor([[[[-2.0, 0.5]]]])).tolist() == [[[[-1.0, 0.5]]]]


def test_what_cannot_be_decoded_says_why(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no VAE is known for dit-xl-2; give --vae to see pictures"):
        PictureDecoder(get_preset("dit-xl-2"), None).open()
    with pytest.raises(CheckpointError, match=r"cannot read an AutoencoderKL from .*; give --vae with a local copy"):
        PictureDecoder(get_preset("dit-xl-2"), find_vae(str(tmp_path), None)).open()
    with pytest.raises(DataError, match="latte-tiny makes videos"):
        PictureDecoder(get_preset("latte-tiny"), None).open()
