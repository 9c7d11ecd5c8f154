"""The models dyexport knows by name, at their published sizes. Imports no torch."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from dyexport.errors import UsageError

Objective = Literal["ddpm", "flow"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A backbone architecture and how it is sampled.

    ``objective`` fixes what the network is called with and what it predicts: ``ddpm`` takes the
    integer-valued timestep in [0, 1000) and predicts the noise (DiT, arXiv 2212.09748); ``flow``
    takes t in [0, 1], 0 = noise and 1 = data, and predicts the velocity ``data - noise`` of the
    straight path (SiT, arXiv 2401.08740).
    """

    name: str
    backbone: Literal["dit", "sit"]
    depth: int
    hidden_size: int
    heads: int
    patch_size: int
    sample_size: int  # latents are (in_channels, sample_size, sample_size)
    in_channels: int
    learn_sigma: bool  # the output then has 2 * in_channels channels
    classes: int = 1000  # label `classes` is the null class of classifier-free guidance
    pixel_space: bool = False  # latents are pixels in [-1, 1]; there is no VAE
    hub_id: str | None = None
    about: str = ""

    @property
    def objective(self) -> Objective:
        return "ddpm" if self.backbone == "dit" else "flow"

    @property
    def timestep_range(self) -> tuple[float, float]:
        """Half-open range of the value the transformer is called with."""
        return (0.0, 1000.0) if self.objective == "ddpm" else (0.0, 1.0)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one sample: (C, H, W)."""
        return self.in_channels, self.sample_size, self.sample_size

    @property
    def tokens(self) -> int:
        return (self.sample_size // self.patch_size) ** 2

    @property
    def parameters(self) -> int:
        """Weights of the static model, shared embedders counted once; the position table is not trained."""
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


def _imagenet(backbone: Literal["dit", "sit"], size: str, sample_size: int) -> Preset:
    depth, hidden_size, heads = _SIZES[size]
    pixels = sample_size * 8
    return Preset(
        name=f"{backbone}-{size}-2" + ("-512" if pixels == 512 else ""),
        backbone=backbone,
        depth=depth,
        hidden_size=hidden_size,
        heads=heads,
        patch_size=2,
        sample_size=sample_size,
        in_channels=4,
        learn_sigma=True,
        hub_id=f"facebook/DiT-XL-2-{pixels}" if (backbone, size) == ("dit", "xl") else None,
        about=f"{'DiT' if backbone == 'dit' else 'SiT'}-{size.upper()}/2, ImageNet, {pixels} px",
    )


def _digits(backbone: Literal["dit", "sit"]) -> Preset:
    return Preset(
        name=f"{backbone}-digits",
        backbone=backbone,
        depth=4,
        hidden_size=64,
        heads=4,
        patch_size=1,
        sample_size=8,
        in_channels=1,
        learn_sigma=False,
        classes=10,
        pixel_space=True,
        about="scikit-learn's handwritten digits, 8 x 8 pixels, trains from scratch in minutes on a CPU",
    )


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        *(_imagenet("dit", size, 32) for size in _SIZES),
        _imagenet("dit", "xl", 64),
        *(_imagenet("sit", size, 32) for size in _SIZES),
        _imagenet("sit", "xl", 64),
        _digits("dit"),
        _digits("sit"),
    )
}


def get_preset(name: str) -> Preset:
    """The preset called ``name``; raises ``UsageError`` naming the nearest known one."""
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(PRESETS)}"
    raise UsageError(f"unknown model {name!r}; {hint}")
