"""Small networks that look at pictures, with random weights, saved as people download them."""

from __future__ import annotations

from pathlib import Path

import torch

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
PICTURES = {"image_size": 16, "patch_size": 8}


def save_dino(directory: Path) -> Path:
    """A DINOv2 of 16 features."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {name: value for name, value in SIZES.items() if name != "intermediate_size"}
    Dinov2Model(Dinov2Config(**sizes, **PICTURES)).save_pretrained(directory)
    return _with_processor(directory)


def save_classifier(directory: Path) -> Path:
    """A ViT of ten classes."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(1)
    ViTForImageClassification(ViTConfig(**SIZES, **PICTURES, num_labels=10)).save_pretrained(directory)
    return _with_processor(directory)


def save_clip(directory: Path) -> Path:
    """A CLIP of eight features, whose tokenizer knows letters."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    from tests.pipeline.tiny_pipeline import LETTERS

    torch.manual_seed(2)
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    text = {**SIZES, "vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 77}
    config = CLIPConfig(text_config=text, vision_config={**SIZES, **PICTURES}, projection_dim=8)
    CLIPModel(config).save_pretrained(directory)
    CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77).save_pretrained(
        directory
    )
    return _with_processor(directory)


def _with_processor(directory: Path) -> Path:
    """Add what resizes to 16 x 16 and normalizes to [-1, 1]."""
    from transformers import ViTImageProcessor

    size = {"height": 16, "width": 16}
    ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(directory)
    return directory


class Means(torch.nn.Module):
    """Means over the channels and over the upper half: four features."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        values = pictures.float()
        upper = values[:, :, : values.shape[2] // 2].mean(dim=[1, 2, 3])
        return torch.cat([values.mean(dim=[2, 3]), upper[:, None]], dim=1)


class Inception(torch.nn.Module):
    """The calling convention of NVIDIA's Inception-v3 for FID: eight bits in, features or scores of classes out."""

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert img.dtype == torch.uint8
        means = img.float().mean(dim=[2, 3])
        return means if return_features else -means


class Maps(torch.nn.Module):
    """A network that does not pool."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures


def save_script(network: torch.nn.Module, file: Path) -> Path:
    torch.jit.script(network).save(str(file))
    return file
