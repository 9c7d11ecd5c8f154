"""Pipelines in small, saved as people download them: text encoders, tokenizers, VAE, scheduler, transformer."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LattePipeline,
    LatteTransformer3DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)

from dyexport.backbones.base import Preset
from dyexport.presets import get_preset

LETTERS = list(string.ascii_lowercase)


def save_pipeline(directory: Path) -> Path:
    """With random weights of the sizes that ``flux-tiny`` takes."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    clip_tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32, "hidden_size": 32}
    clip = CLIPTextModel(CLIPTextConfig(vocab_size=len(words), bos_token_id=0, eos_token_id=1, **sizes))
    t5, t5_tokenizer = _t5(64)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=small_vae(shift_factor=0.1, scaling_factor=0.3),
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=FluxTransformer2DModel(**get_preset("flux-tiny").transformer_config()),
    )
    with torch.no_grad():
        pipe.save_pretrained(directory)
    return directory


def save_latte_pipeline(directory: Path) -> Path:
    """With random weights of the sizes that ``latte-tiny`` takes."""
    t5, t5_tokenizer = _t5(32)
    pipe = LattePipeline(
        scheduler=DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False),
        vae=small_vae(),
        text_encoder=t5,
        tokenizer=t5_tokenizer,
        transformer=LatteTransformer3DModel(**get_preset("latte-tiny").transformer_config()),
    )
    with torch.no_grad():
        pipe.save_pretrained(directory)
    return directory


def save_dit_pipeline(directory: Path, preset: Preset) -> Path:
    """With random weights of the sizes of a preset, and a VAE of as many channels."""
    config = preset.transformer_config()
    pipe = DiTPipeline(
        transformer=DiTTransformer2DModel(**config),
        vae=small_vae(latent_channels=config["in_channels"]),
        scheduler=DDIMScheduler(clip_sample=False),
    )
    pipe.save_pretrained(directory)
    return directory


def save_qwen_image_pipeline(directory: Path) -> Path:
    """With random weights of the sizes that ``qwen-image-tiny`` takes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    words = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"]
    tokenizer = Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    rotary = {"rope_theta": 10000.0, "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 256}
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": len(words)}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": 64}
    config = Qwen2_5_VLConfig(text_config={**sizes, **heads, **rotary}, vision_config=vision)
    preset = get_preset("qwen-image-tiny")
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**preset.sampling.scheduler),
        vae=AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[0.9] * 4
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(**preset.transformer_config()),
    )
    with torch.no_grad():
        pipe.save_pretrained(directory)
    return directory


def _t5(channels: int) -> tuple[Any, Any]:
    """A text encoder and its tokenizer, of letters."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in LETTERS)]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0)
    sizes = {"d_model": channels, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes)), tokenizer


def small_vae(latent_channels: int = 4, **settings: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=latent_channels,
        norm_num_groups=1,
        layers_per_block=1,
        **settings,
    )
