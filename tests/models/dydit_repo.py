"""The published DyDiT code, imported from a checkout, without the libraries of which it needs a name or two."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dyexport.presets import Preset


class PatchEmbed(nn.Module):
    """As in timm: (B, C, H, W) -> (B, N, D)."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, bias: bool) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size, bias=bias)

    def forward(self, latents: Tensor) -> Tensor:
        tokens: Tensor = self.proj(latents).flatten(2).transpose(1, 2)
        return tokens


def rearrange(value: Tensor, pattern: str, **sizes: int) -> Tensor:
    """The two patterns of einops that are needed: splitting the first dimension by ``qkv``, and joining it again."""
    return value.unflatten(0, (sizes["qkv"], -1)) if pattern.startswith("(qkv") else value.flatten(0, 1)


def _module(name: str, **names: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(names)
    return module


STAND_INS = (
    _module("timm"),
    _module("timm.models"),
    _module("timm.models.vision_transformer", PatchEmbed=PatchEmbed, Attention=None, Mlp=None),
    _module("timm.layers"),
    _module("timm.layers.helpers", to_2tuple=lambda value: (value, value)),
    _module("einops", rearrange=rearrange),
    _module("easydict", EasyDict=dict),
)
OWN = ("models", "dynamic_model")


@contextmanager
def published_code(checkout: Path) -> Iterator[ModuleType]:
    """DyDiT's ``models.py``; nothing of it stays in ``sys.modules``."""
    before = dict(sys.modules)
    sys.modules.update({module.__name__: module for module in STAND_INS})
    sys.path.insert(0, str(checkout / "DyDiT"))
    try:
        yield __import__("models")
    finally:
        sys.path.remove(str(checkout / "DyDiT"))
        for name in (*OWN, *(module.__name__ for module in STAND_INS)):
            sys.modules.pop(name, None)
            if name in before:
                sys.modules[name] = before[name]


@torch.no_grad()
def random_published(code: ModuleType, preset: Preset) -> nn.Module:
    """DyDiT with random weights: gates change with t, positions drift as by averaging."""
    torch.manual_seed(0)
    model: nn.Module = code.DiT(
        input_size=preset.sample_size,
        patch_size=preset.patch_size,
        in_channels=preset.in_channels,
        hidden_size=preset.hidden_size,
        depth=preset.depth,
        num_heads=preset.heads,
        num_classes=preset.classes,
        learn_sigma=preset.learn_sigma,
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
    drift = torch.randn(model.get_parameter("pos_embed").shape) * 1e-4
    model.get_parameter("pos_embed").add_(drift)
    for name, router in model.named_modules():
        if name.endswith("_rate.router") and isinstance(router, nn.Linear):
            _spread(model, router, preset)
    return model.eval()


def _spread(model: nn.Module, router: nn.Linear, preset: Preset) -> None:
    """Let each gate change at a random t of its own."""
    start, end = preset.timestep_range
    crossing = start + (end - start) * torch.rand(router.out_features)  # (U,)
    embedding = model.get_submodule("t_embedder")(crossing)  # (U, C)
    router.bias.copy_(-(router.weight * embedding).sum(dim=1))
