"""DiT and SiT as numbers: sizes, shapes, published models. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dyexport.backbones.base import Objective, Preset


@dataclass(frozen=True, kw_only=True)
class DiTPreset(Preset):
    """DiT and SiT: diffusers' ``DiTTransformer2DModel``."""

    backbone: Literal["dit", "sit"]
    layers: int
    patch_size: int
    sample_size: int  # latents are (in_channels, sample_size, sample_size)
    learn_sigma: bool  # the output then has 2 * in_channels channels
    classes: int = 1000

    @property
    def objective(self) -> Objective:
        return "ddpm" if self.backbone == "dit" else "flow"

    @property
    def depth(self) -> int:
        return self.layers

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return self.in_channels, self.sample_size, self.sample_size

    @property
    def tokens(self) -> int:
        return (self.sample_size // self.patch_size) ** 2

    @property
    def parameters(self) -> int:
        """The position table is not trained."""
        width, patch = self.hidden_size, self.patch_size**2
        outputs = patch * self.in_channels * (2 if self.learn_sigma else 1)
        embedders = (patch * self.in_channels + 1) * width + (256 + 1) * width + (width + 1) * width
        blocks = self.depth * (18 * width**2 + 15 * width)  # modulation 6, attention 4, MLP 8
        final = 2 * width * (width + 1) + outputs * (width + 1)
        return embedders + (self.classes + 1) * width + blocks + final

    def transformer_config(self) -> dict[str, object]:
        """Arguments of diffusers' ``DiTTransformer2DModel``."""
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
        about=f"scikit-learn's handwritten digits, 8 x 8 pixels, {about}",
    )


PRESETS: tuple[Preset, ...] = (
    *(_imagenet("dit", size, 32) for size in _SIZES),
    _imagenet("dit", "xl", 64),
    *(_imagenet("sit", size, 32) for size in _SIZES),
    _imagenet("sit", "xl", 64),
    _digits("dit", about="trains from scratch in minutes on a CPU"),
    _digits("sit", about="trains from scratch in minutes on a CPU"),
    _digits("sit", "-wide", hidden_size=128, about="with width to spare"),
)
