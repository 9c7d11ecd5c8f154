"""Sizes, shapes and published models of DiT and SiT. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from dyexport.backbones.base import Objective, Preset, SamplingDefaults
from dyexport.backbones.calibration_effort import THOROUGH
from dyexport.backbones.recipe import Recipe, Schedule
from dyexport.backbones.stored_config import MOST_LAYERS, StoredConfig

FREQ_SHIFT = "freq_shift"  # config entry: the timestep's frequency i is 10000 ** (-i / (128 - shift)); diffusers has 1
STORED_POSITIONS = "stored_positions"  # config entry: the position table is a weight; diffusers computes it
DEFAULTS: Mapping[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "upcast_attention": False,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
}
"""Default arguments of diffusers' ``DiTTransformer2DModel``, for a configuration without them."""


@dataclass(frozen=True, kw_only=True)
class DiTPreset(Preset):
    """A DiT or SiT: diffusers' ``DiTTransformer2DModel``. Sizes default to those of DiT-XL/2 at 256 px."""

    stock: ClassVar[str] = "DiTTransformer2DModel"
    pipeline: ClassVar[str] = "DiTPipeline"

    backbone: Literal["dit", "sit"] = "dit"
    hidden_size: int = 1152
    heads: int = 16
    in_channels: int = 4
    layers: int = 28
    patch_size: int = 2
    sample_size: int = 32  # latents are (in_channels, sample_size, sample_size)
    learn_sigma: bool = True  # the output then has 2 * in_channels channels
    classes: int = 1000

    @property
    def objective(self) -> Objective:
        return "ddpm" if self.backbone == "dit" else "flow"

    @property
    def depth(self) -> int:
        return self.layers

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape (C, H, W)."""
        return self.in_channels, self.sample_size, self.sample_size

    @property
    def tokens(self) -> int:
        return (self.sample_size // self.patch_size) ** 2

    @property
    def parameters(self) -> int:
        """Weights of the static model, without the position table, which is not trained."""
        width, patch = self.hidden_size, self.patch_size**2
        outputs = patch * self.in_channels * (2 if self.learn_sigma else 1)
        embedders = (patch * self.in_channels + 1) * width + (256 + 1) * width + (width + 1) * width
        blocks = self.depth * (18 * width**2 + 15 * width)  # modulation 6, attention 4, MLP 8
        final = 2 * width * (width + 1) + outputs * (width + 1)
        return embedders + (self.classes + 1) * width + blocks + final

    def transformer_config(self) -> dict[str, object]:
        """Return the arguments of diffusers' ``DiTTransformer2DModel``."""
        return {
            "num_attention_heads": self.heads,
            "attention_head_dim": self.hidden_size // self.heads,
            "in_channels": self.in_channels,
            "out_channels": self.in_channels * (2 if self.learn_sigma else 1),
            "num_layers": self.depth,
            "sample_size": self.sample_size,
            "patch_size": self.patch_size,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": self.classes,
            "norm_type": "ada_norm_zero",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
        }

    def structure(self, config: Mapping[str, Any]) -> dict[str, Any]:
        stored = StoredConfig(config, DEFAULTS)
        for name in ("attention_bias", "activation_fn", "norm_type", "norm_elementwise_affine"):
            stored.expect(name, self.transformer_config().get(name, DEFAULTS[name]))
        hidden_size, in_channels = stored.hidden_size(multiple=4), stored.count("in_channels")
        out_channels = stored.out_channels(in_channels)
        if out_channels not in (in_channels, 2 * in_channels):
            stored.refuse("out_channels", f"{in_channels}, as in_channels, or twice that")
        sample_size, patch_size = stored.count("sample_size"), stored.count("patch_size")
        if sample_size % patch_size:
            stored.refuse("patch_size", f"one that divides sample_size, {sample_size}")
        return {
            "layers": stored.count("num_layers", MOST_LAYERS),
            "hidden_size": hidden_size,
            "heads": stored.count("num_attention_heads"),
            "patch_size": patch_size,
            "sample_size": sample_size,
            "in_channels": in_channels,
            "learn_sigma": out_channels != in_channels,
            "classes": stored.count("num_embeds_ada_norm"),
            "pixel_space": self.pixel_space and in_channels == self.in_channels,
        }

    @classmethod
    def sampling_of(cls, config: Mapping[str, Any]) -> SamplingDefaults:
        return SamplingDefaults(steps=50, guidance=1.5)

    def numerics(self, config: Mapping[str, Any]) -> dict[str, Any]:
        stored = StoredConfig(config, DEFAULTS)
        kept: dict[str, Any] = {"norm_eps": stored.number("norm_eps", 1e-12, 1)}
        if FREQ_SHIFT in config:
            kept[FREQ_SHIFT] = stored.number(FREQ_SHIFT, 0, 127)
        if STORED_POSITIONS in config:
            kept[STORED_POSITIONS] = stored.flag(STORED_POSITIONS)
        return kept


_SIZES = {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)}


def _imagenet(backbone: Literal["dit", "sit"], size: str, sample_size: int) -> DiTPreset:
    depth, hidden_size, heads = _SIZES[size]
    pixels = sample_size * 8
    return DiTPreset(
        name=f"{backbone}-{size}-2" + ("-512" if pixels == 512 else ""),
        backbone=backbone,
        layers=depth,
        hidden_size=hidden_size,
        heads=heads,
        patch_size=2,
        sample_size=sample_size,
        in_channels=4,
        learn_sigma=True,
        engines=8 if size in ("s", "b") else 4,
        hub_id=f"facebook/DiT-XL-2-{pixels}" if (backbone, size) == ("dit", "xl") else None,
        about=f"{'DiT' if backbone == 'dit' else 'SiT'}-{size.upper()}/2, ImageNet, {pixels} px",
    )


_DIGITS_SCHEDULE = Schedule(steps=2500, batch_size=32, learning_rate=3e-3, ema_decay=0.99, lr_decay=0.5)
DIGITS = Recipe(
    from_scratch=replace(_DIGITS_SCHEDULE, steps=2000),
    finetune=_DIGITS_SCHEDULE,
    finetune_lora=replace(_DIGITS_SCHEDULE, learning_rate=1e-2),
    data="digits",
    calibration=THOROUGH,
    distill=True,  # published runs, a hundred times longer, do not need it
)


def _digits(backbone: Literal["dit", "sit"], suffix: str = "", *, hidden_size: int = 64, about: str) -> DiTPreset:
    return DiTPreset(
        name=f"{backbone}-digits{suffix}",
        backbone=backbone,
        layers=4,
        hidden_size=hidden_size,
        heads=hidden_size // 16,
        patch_size=1,
        sample_size=8,
        in_channels=1,
        learn_sigma=False,
        classes=10,
        pixel_space=True,
        recipe=DIGITS,
        about=f"scikit-learn's handwritten digits, 8 x 8 pixels, {about}",
    )


_EMOJI_SCHEDULE = Schedule(steps=2500, batch_size=64, learning_rate=2e-3, ema_decay=0.99, lr_decay=0.5)
EMOJI = Recipe(
    from_scratch=replace(_EMOJI_SCHEDULE, steps=10_000, ema_decay=0.999),
    finetune=_EMOJI_SCHEDULE,
    finetune_lora=replace(_EMOJI_SCHEDULE, learning_rate=1e-2),
    data="emoji",
    calibration=THOROUGH,
    distill=True,
)


PRESETS: tuple[Preset, ...] = (
    *(_imagenet("dit", size, 32) for size in _SIZES),
    _imagenet("dit", "xl", 64),
    *(_imagenet("sit", size, 32) for size in _SIZES),
    _imagenet("sit", "xl", 64),
    _digits("dit", about="trains from scratch in minutes on a CPU"),
    _digits("sit", about="trains from scratch in minutes on a CPU"),
    _digits("sit", "-wide", hidden_size=128, about="twice as wide"),
    DiTPreset(
        name="sit-emoji",
        backbone="sit",
        layers=6,
        hidden_size=128,
        heads=8,
        patch_size=4,
        sample_size=32,
        in_channels=3,
        learn_sigma=False,
        classes=9,
        pixel_space=True,
        recipe=EMOJI,
        about="emoji in color, 32 x 32 pixels, trains from scratch in an hour on a CPU",
    ),
    replace(
        _digits("sit", about=""),
        name="sit-tiny",
        about="a small SiT, hardly trained, for quick trials on a CPU",
        layers=2,
        hidden_size=48,
        heads=8,
        patch_size=2,
        recipe=replace(DIGITS, from_scratch=replace(_DIGITS_SCHEDULE, steps=3)),
    ),
)
