"""Backbone architectures as numbers: sizes, shapes, how each is called and sampled. Imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal, Self

Objective = Literal["ddpm", "flow", "flow-sigma"]
RouterKind = Literal["free", "ordered"]
"""Whether the units of a block that are on at a timestep may be any, or are always the first ones."""


@dataclass(frozen=True, kw_only=True)
class Preset(ABC):
    """A backbone architecture and how it is sampled.

    ``objective`` fixes what the network is called with and what it predicts: ``ddpm`` takes the
    integer-valued timestep in [0, 1000) and predicts the noise (DiT, arXiv 2212.09748); ``flow``
    takes t in [0, 1], 0 = noise and 1 = data, and predicts the velocity ``data - noise`` of the
    straight path (SiT, arXiv 2401.08740); ``flow-sigma`` is the same path the other way round, sigma
    in [0, 1], 1 = noise, and predicts ``noise - data`` (FLUX).
    """

    name: str
    backbone: str
    hidden_size: int
    heads: int
    in_channels: int
    classes: int = 0  # class labels; label `classes` is the null class. 0: not conditioned on classes
    text_tokens: int = 0  # of a usual prompt
    pixel_space: bool = False  # latents are pixels in [-1, 1]; there is no VAE
    engines: int = 4  # K, unless a build says otherwise: more where weights are so few that a copy for each is nothing
    hub_id: str | None = None
    about: str = ""

    @property
    @abstractmethod
    def objective(self) -> Objective: ...

    @property
    @abstractmethod
    def depth(self) -> int:
        """Blocks that have gates, L."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """Of one sample."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Tokens that a router may skip, N."""

    @property
    @abstractmethod
    def parameters(self) -> int:
        """Weights of the static model, shared embedders counted once."""

    @abstractmethod
    def transformer_config(self) -> dict[str, object]:
        """Arguments of the stock diffusers module."""

    @property
    def timestep_range(self) -> tuple[float, float]:
        """Half-open range of the value the transformer is called with."""
        return (0.0, 1000.0) if self.objective == "ddpm" else (0.0, 1.0)

    def for_noise(self) -> Self:
        """What noise is drawn for: a smaller picture where the backbone takes any, for widths do not depend on it."""
        return self


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


@dataclass(frozen=True, kw_only=True)
class FluxPreset(Preset):
    """FLUX.1: diffusers' ``FluxTransformer2DModel``. Sizes default to those of FLUX.1-dev at 1024 px."""

    backbone: Literal["flux"] = "flux"
    hidden_size: int = 3072
    heads: int = 24
    in_channels: int = 64  # of a token: 2 x 2 latent pixels
    double_blocks: int = 19
    single_blocks: int = 38
    side: int = 64  # tokens along an edge of the picture
    text_tokens: int = 512
    joint_size: int = 4096  # channels of the text encoder's output
    pooled_size: int = 768
    rope_axes: tuple[int, int, int] = (16, 56, 56)
    guidance: float | None = 3.5  # usual scale of a guidance-distilled model; None: guidance is not embedded
    shifted: bool = True  # the sampler's steps crowd at high noise, the more the larger the picture

    @property
    def objective(self) -> Objective:
        return "flow-sigma"

    @property
    def depth(self) -> int:
        return self.double_blocks + self.single_blocks

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
        vectors = 1 if self.guidance is None else 2  # timestep, and guidance
        embedders = (self.in_channels + self.joint_size + 2) * width
        embedders += vectors * (256 + 1 + width + 1) * width + (self.pooled_size + 1 + width + 1) * width
        double = 36 * width**2 + 30 * width + 4 * head  # per stream: modulation 6, attention 4, MLP 8
        single = 15 * width**2 + 11 * width + 2 * head  # modulation 3, attention 3, MLP 4, both out 5
        final = 2 * width * (width + 1) + self.in_channels * (width + 1)
        return embedders + self.double_blocks * double + self.single_blocks * single + final

    def transformer_config(self) -> dict[str, object]:
        """Arguments of diffusers' ``FluxTransformer2DModel``."""
        return {
            "patch_size": 1,
            "in_channels": self.in_channels,
            "num_layers": self.double_blocks,
            "num_single_layers": self.single_blocks,
            "attention_head_dim": self.hidden_size // self.heads,
            "num_attention_heads": self.heads,
            "joint_attention_dim": self.joint_size,
            "pooled_projection_dim": self.pooled_size,
            "guidance_embeds": self.guidance is not None,
            "axes_dims_rope": list(self.rope_axes),
        }

    def for_noise(self) -> Self:
        """128 px and 32 words."""
        return replace(self, side=min(self.side, 8), text_tokens=min(self.text_tokens, 32))


@dataclass(frozen=True, kw_only=True)
class LattePreset(Preset):
    """Latte, text to video: diffusers' ``LatteTransformer3DModel``. Sizes default to those of Latte-1."""

    backbone: Literal["latte"] = "latte"
    hidden_size: int = 1152
    heads: int = 16
    in_channels: int = 4
    pairs: int = 28  # of a spatial and a temporal block
    patch_size: int = 2
    sample_size: int = 64  # a frame of latents is (in_channels, sample_size, sample_size)
    frames: int = 16
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
        """(C, F, H, W)."""
        return self.in_channels, self.frames, self.sample_size, self.sample_size

    @property
    def tokens(self) -> int:
        """Of all frames together."""
        return self.frames * (self.sample_size // self.patch_size) ** 2

    @property
    def parameters(self) -> int:
        """Position tables are not trained."""
        width, patch = self.hidden_size, self.patch_size**2 * self.in_channels
        embedders = (patch + 256 + self.caption_size + 3) * width + 2 * (width + 1) * width
        modulation = 6 * (width + 1) * width
        spatial = 16 * width**2 + 19 * width  # table of the modulation 6, attention 4, to text 4, MLP 8
        temporal = 12 * width**2 + 15 * width
        final = 2 * width + 2 * patch * (width + 1)
        return embedders + modulation + self.pairs * (spatial + temporal) + final

    def transformer_config(self) -> dict[str, object]:
        """Arguments of diffusers' ``LatteTransformer3DModel``."""
        return {
            "num_attention_heads": self.heads,
            "attention_head_dim": self.hidden_size // self.heads,
            "in_channels": self.in_channels,
            "out_channels": 2 * self.in_channels,  # noise, and the variance that the model has learned
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

    def for_noise(self) -> Self:
        """64 px and 32 words, in as many frames."""
        return replace(self, sample_size=min(self.sample_size, 8), text_tokens=min(self.text_tokens, 32))
