"""Qwen-Image as numbers: sizes, shapes, published models. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from dyexport.backbones.base import Objective, Preset, SamplingDefaults
from dyexport.backbones.calibration_effort import SPARSE
from dyexport.backbones.recipe import LOW_RANK_FINETUNING
from dyexport.backbones.stored_config import MOST_LAYERS, StoredConfig

DEFAULTS: Mapping[str, Any] = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
    "zero_cond_t": False,
    "use_additional_t_cond": False,
    "use_layer3d_rope": False,
}
"""Arguments of diffusers' ``QwenImageTransformer2DModel`` where a config does not give them."""

UNCONDITIONAL = " "
"""Prompt of the unconditional prediction, as published."""

PATCH_SIZE = 2  # latent pixels along an edge of a token


@dataclass(frozen=True, kw_only=True)
class QwenImagePreset(Preset):
    """Qwen-Image (arXiv 2508.02324): diffusers' ``QwenImageTransformer2DModel``.

    Sizes default to those of Qwen-Image at 1024 px with the longest prompt that its pipeline takes by default.
    """

    stock: ClassVar[str] = "QwenImageTransformer2DModel"
    pipeline: ClassVar[str] = "QwenImagePipeline"
    rescales_guidance: ClassVar[bool] = True
    token_routers = ("compact",)

    backbone: Literal["qwen_image"] = "qwen_image"
    hidden_size: int = 3072
    heads: int = 24
    in_channels: int = 64  # of a token: 2 x 2 latent pixels
    layers: int = 60
    side: int = 64  # tokens along an edge of the picture
    text_tokens: int = 512
    joint_size: int = 3584  # channels of the text encoder's output
    rope_axes: tuple[int, int, int] = (16, 56, 56)

    @property
    def objective(self) -> Objective:
        return "flow-sigma"

    @property
    def depth(self) -> int:
        return self.layers

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(N, C): packed, as the network takes them."""
        return self.tokens, self.in_channels

    @property
    def tokens(self) -> int:
        return self.side**2

    @property
    def parameters(self) -> int:
        width, head = self.hidden_size, self.hidden_size // self.heads
        embedders = (256 + 1 + width + 1) * width  # timestep
        embedders += (self.in_channels + 1) * width + self.joint_size + (self.joint_size + 1) * width
        block = 36 * width**2 + 30 * width + 4 * head  # per stream: modulation 6, attention 4, MLP 8
        final = 2 * width * (width + 1) + self.in_channels * (width + 1)
        return embedders + self.layers * block + final

    def transformer_config(self) -> dict[str, object]:
        """Return the arguments of diffusers' ``QwenImageTransformer2DModel``."""
        return {
            "patch_size": PATCH_SIZE,
            "in_channels": self.in_channels,
            "out_channels": self.in_channels // PATCH_SIZE**2,
            "num_layers": self.layers,
            "attention_head_dim": self.hidden_size // self.heads,
            "num_attention_heads": self.heads,
            "joint_attention_dim": self.joint_size,
            "axes_dims_rope": list(self.rope_axes),
        }

    def structure(self, config: Mapping[str, Any]) -> dict[str, Any]:
        stored = StoredConfig(config, DEFAULTS)
        for name in ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
            stored.expect(name, False)
        stored.expect("patch_size", PATCH_SIZE)
        in_channels = stored.count("in_channels")
        if stored.out_channels(in_channels) * PATCH_SIZE**2 != in_channels:
            stored.refuse("out_channels", f"a quarter of in_channels, {in_channels}")
        head_dim, axes = stored.count("attention_head_dim"), stored.counts("axes_dims_rope")
        if len(axes) != len(self.rope_axes) or sum(axes) != head_dim or any(size % 2 for size in axes):
            stored.refuse("axes_dims_rope", f"three even numbers that add up to attention_head_dim, {head_dim}")
        return {
            "layers": stored.count("num_layers", MOST_LAYERS),
            "hidden_size": stored.hidden_size(multiple=2),
            "heads": stored.count("num_attention_heads"),
            "in_channels": in_channels,
            "joint_size": stored.count("joint_attention_dim"),
            "rope_axes": axes,
        }

    @classmethod
    def sampling_of(cls, config: Mapping[str, Any]) -> SamplingDefaults:
        """Return the defaults of diffusers' ``QwenImagePipeline``, and the scheduler of the published model."""
        scheduler = {
            "use_dynamic_shifting": True,
            "base_shift": 0.5,
            "max_shift": 0.9,
            "base_image_seq_len": 256,
            "max_image_seq_len": 8192,
            "shift_terminal": 0.02,
        }
        return SamplingDefaults(steps=50, guidance=4.0, scheduler=scheduler)

    def for_noise(self) -> Self:
        """Return the preset of a picture of 128 px and a prompt of 32 tokens."""
        return replace(self, side=min(self.side, 8), text_tokens=min(self.text_tokens, 32))


PRESETS: tuple[Preset, ...] = (
    QwenImagePreset(
        name="qwen-image",
        hub_id="Qwen/Qwen-Image",
        about="Qwen-Image, 20 B parameters",
        recipe=replace(LOW_RANK_FINETUNING, calibration=SPARSE),
    ),
    QwenImagePreset(
        name="qwen-image-tiny",
        hidden_size=128,
        heads=4,
        in_channels=16,
        layers=4,
        side=8,
        text_tokens=16,
        joint_size=64,
        rope_axes=(8, 12, 12),
        about="Qwen-Image in small, for trying things out on a CPU",
    ),
)
