"""Sizes, shapes and published models of Latte. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from dyexport.backbones.base import Objective, Preset, SamplingDefaults
from dyexport.backbones.calibration_effort import SPARSE
from dyexport.backbones.recipe import FULL_FINETUNING
from dyexport.backbones.stored_config import MOST_LAYERS, StoredConfig

DEFAULTS: Mapping[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 88,
    "in_channels": None,
    "out_channels": None,
    "num_layers": 1,
    "dropout": 0.0,
    "cross_attention_dim": None,
    "attention_bias": False,
    "sample_size": 64,
    "patch_size": None,
    "activation_fn": "geglu",
    "num_embeds_ada_norm": None,
    "norm_type": "layer_norm",
    "norm_elementwise_affine": True,
    "norm_eps": 1e-5,
    "caption_channels": None,
    "video_length": 16,
}
"""Default arguments of diffusers' ``LatteTransformer3DModel``, for a configuration without them."""


@dataclass(frozen=True, kw_only=True)
class LattePreset(Preset):
    """A Latte, text to video: diffusers' ``LatteTransformer3DModel``. Sizes default to those of Latte-1."""

    stock: ClassVar[str] = "LatteTransformer3DModel"
    pipeline: ClassVar[str] = "LattePipeline"

    backbone: Literal["latte"] = "latte"
    hidden_size: int = 1152
    heads: int = 16
    in_channels: int = 4
    pairs: int = 28  # each of a spatial and a temporal block
    patch_size: int = 2
    sample_size: int = 64  # a frame of latents is (in_channels, sample_size, sample_size)
    frames: int = 16
    learn_sigma: bool = True  # the output then has 2 * in_channels channels
    text_tokens: int = 120
    caption_size: int = 4096  # channels of the text encoder's output

    @property
    def objective(self) -> Objective:
        return "ddpm"

    @property
    def depth(self) -> int:
        return 2 * self.pairs

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape (C, F, H, W)."""
        return self.in_channels, self.frames, self.sample_size, self.sample_size

    @property
    def tokens(self) -> int:
        """Tokens of all frames together."""
        return self.frames * (self.sample_size // self.patch_size) ** 2

    @property
    def parameters(self) -> int:
        """Weights of the static model, without position tables, which are not trained."""
        width, patch = self.hidden_size, self.patch_size**2 * self.in_channels
        outputs = patch * (2 if self.learn_sigma else 1)
        embedders = (patch + 256 + self.caption_size + 3) * width + 2 * (width + 1) * width
        modulation = 6 * (width + 1) * width
        spatial = 16 * width**2 + 19 * width  # table of the modulation 6, attention 4, to text 4, MLP 8
        temporal = 12 * width**2 + 15 * width
        final = 2 * width + outputs * (width + 1)
        return embedders + modulation + self.pairs * (spatial + temporal) + final

    def transformer_config(self) -> dict[str, object]:
        """Return the arguments of diffusers' ``LatteTransformer3DModel``."""
        return {
            "num_attention_heads": self.heads,
            "attention_head_dim": self.hidden_size // self.heads,
            "in_channels": self.in_channels,
            "out_channels": self.in_channels * (2 if self.learn_sigma else 1),
            "num_layers": self.pairs,
            "cross_attention_dim": self.hidden_size,
            "attention_bias": True,
            "sample_size": self.sample_size,
            "patch_size": self.patch_size,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "caption_channels": self.caption_size,
            "video_length": self.frames,
        }

    def structure(self, config: Mapping[str, Any]) -> dict[str, Any]:
        stored, own = StoredConfig(config, DEFAULTS), self.transformer_config()
        for name in ("attention_bias", "activation_fn", "norm_type", "norm_elementwise_affine"):
            stored.expect(name, own[name])
        if stored.value("caption_channels") is None:
            stored.refuse("caption_channels", "channels of embedded captions; diffusers' Latte takes no class labels")
        hidden_size, in_channels = stored.hidden_size(multiple=4), stored.count("in_channels")
        stored.expect("cross_attention_dim", hidden_size)
        out_channels = stored.out_channels(in_channels)
        if out_channels not in (in_channels, 2 * in_channels):
            stored.refuse("out_channels", f"{in_channels}, as in_channels, or twice that")
        sample_size, patch_size = stored.count("sample_size"), stored.count("patch_size")
        if sample_size % patch_size:
            stored.refuse("patch_size", f"one that divides sample_size, {sample_size}")
        return {
            "pairs": stored.count("num_layers", MOST_LAYERS),
            "hidden_size": hidden_size,
            "heads": stored.count("num_attention_heads"),
            "patch_size": patch_size,
            "sample_size": sample_size,
            "frames": stored.count("video_length"),
            "in_channels": in_channels,
            "learn_sigma": out_channels != in_channels,
            "caption_size": stored.count("caption_channels"),
        }

    @classmethod
    def sampling_of(cls, config: Mapping[str, Any]) -> SamplingDefaults:
        """Return the defaults of diffusers' ``LattePipeline``."""
        return SamplingDefaults(steps=50, guidance=7.5)

    def numerics(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"norm_eps": StoredConfig(config, DEFAULTS).number("norm_eps", 1e-12, 1)}

    def for_noise(self) -> Self:
        """Return the preset at 64 px and 32 text tokens at most, with the same number of frames."""
        return replace(self, sample_size=min(self.sample_size, 8), text_tokens=min(self.text_tokens, 32))


PRESETS: tuple[Preset, ...] = (
    LattePreset(
        name="latte",
        hub_id="maxin-cn/Latte-1",
        about="Latte-1, text to video, 16 frames of 512 px",
        recipe=replace(FULL_FINETUNING, calibration=SPARSE),
    ),
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
