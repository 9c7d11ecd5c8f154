"""The published DyDiT code, imported from a checkout, without the libraries of which it needs a name or two."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dyexport.backbones.dit.preset import DiTPreset
from dyexport.backbones.flux.preset import FluxPreset


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
    _module("einops", rearrange=rearrange, reduce=None, repeat=None),
    _module("easydict", EasyDict=dict),
)
DYDIT = ("DyDiT", "models", "dynamic_model")  # its folder, and its modules, the one to import first
DYFLUX = (
    "DyFLUX",
    "flux_models.transformer_flux_dyn",
    "flux_models.attention_processor_dyn",
    "flux_models.dy_utils",
    "flux_models",
)


@contextmanager
def published_code(checkout: Path, code: tuple[str, ...]) -> Iterator[ModuleType]:
    """A module of the published code; nothing of it stays in ``sys.modules``."""
    folder, *own = code
    before = dict(sys.modules)
    sys.modules.update({module.__name__: module for module in STAND_INS})
    sys.path.insert(0, str(checkout / folder))
    try:
        yield import_module(own[0])
    finally:
        sys.path.remove(str(checkout / folder))
        for name in (*own, *(module.__name__ for module in STAND_INS)):
            sys.modules.pop(name, None)
            if name in before:
                sys.modules[name] = before[name]


@torch.no_grad()
def random_published(code: ModuleType, preset: DiTPreset) -> nn.Module:
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


def _spread(model: nn.Module, router: nn.Linear, preset: DiTPreset) -> None:
    """Let each gate change at a random t of its own."""
    start, end = preset.timestep_range
    crossing = start + (end - start) * torch.rand(router.out_features)  # (U,)
    embedding = model.get_submodule("t_embedder")(crossing)  # (U, C)
    router.bias.copy_(-(router.weight * embedding).sum(dim=1))


@torch.no_grad()
def random_dyflux(code: ModuleType, preset: FluxPreset) -> nn.Module:
    """DyFLUX with random weights and token gates of either kind."""
    torch.manual_seed(0)
    model: nn.Module = code.DynFluxTransformer2DModel(**preset.transformer_config())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.normal_(module.bias, std=0.1)
        elif name.endswith("token_selection.norm"):
            nn.init.normal_(module.get_parameter("weight"), mean=1.0, std=0.2)
            nn.init.normal_(module.get_parameter("bias"), std=0.2)
    return model.eval()
