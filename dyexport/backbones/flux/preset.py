"""FLUX.1 as numbers: sizes, shapes, published models. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any, ClassVar, Literal, Self

from dyexport.backbones.base import Guidance, Objective, Preset, SamplingDefaults
from dyexport.backbones.calibration_effort import SPARSE
from dyexport.backbones.recipe import LOW_RANK_FINETUNING
from dyexport.backbones.stored_config import MOST_LAYERS, StoredConfig

DEFAULTS: Mapping[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "out_channels": None,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
}
"""Arguments of diffusers' ``FluxTransformer2DModel`` where a config does not give them."""


@dataclass(frozen=True, kw_only=True)
class FluxPreset(Preset):
    """FLUX.1: diffusers' ``FluxTransformer2DModel``. Sizes default to those of FLUX.1-dev at 1024 px.

    A model that edits pictures takes more channels than it predicts: latents first, then ``context_channels`` of a
    masked picture and its mask (Fill), or of a control picture (Canny, Depth).
    """

    stock: ClassVar[str] = "FluxTransformer2DModel"
    pipeline: ClassVar[str] = "FluxPipeline"
    guidance_kind: ClassVar[Guidance] = "embedded"
    token_routers = ("published", "compact")

    backbone: Literal["flux"] = "flux"
    hidden_size: int = 3072
    heads: int = 24
    in_channels: int = 64  # of a token: 2 x 2 latent pixels, and the context
    context_channels: int = 0  # of a token that are a condition, and not predicted
    double_blocks: int = 19
    single_blocks: int = 38
    side: int = 64  # tokens along an edge of the picture
    text_tokens: int = 512
    joint_size: int = 4096  # channels of the text encoder's output
    pooled_size: int = 768
    rope_axes: tuple[int, int, int] = (16, 56, 56)
    guidance: float | None = 3.5  # default scale of a guidance-distilled model; None: guidance is not embedded

    @property
    def objective(self) -> Objective:
        return "flow-sigma"

    @property
    def depth(self) -> int:
        return self.double_blocks + self.single_blocks

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(N, C): packed, as the network takes them."""
        return self.tokens, self.out_channels

    @property
    def out_channels(self) -> int:
        """Channels of a token that are predicted."""
        return self.in_channels - self.context_channels

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
        final = 2 * width * (width + 1) + self.out_channels * (width + 1)
        return embedders + self.double_blocks * double + self.single_blocks * single + final

    def transformer_config(self) -> dict[str, object]:
        """Return the arguments of diffusers' ``FluxTransformer2DModel``."""
        config: dict[str, object] = {
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
        return {**config, "out_channels": self.out_channels} if self.context_channels else config

    def structure(self, config: Mapping[str, Any]) -> dict[str, Any]:
        stored = StoredConfig(config, DEFAULTS)
        stored.expect("patch_size", 1)
        head_dim, axes = stored.count("attention_head_dim"), stored.counts("axes_dims_rope")
        if len(axes) != len(self.rope_axes) or sum(axes) != head_dim or any(size % 2 for size in axes):
            stored.refuse("axes_dims_rope", f"three even numbers that add up to attention_head_dim, {head_dim}")
        in_channels = stored.count("in_channels")
        out_channels = stored.out_channels(in_channels)
        if out_channels > in_channels:
            stored.refuse("out_channels", f"at most in_channels, {in_channels}")
        fields: dict[str, Any] = {
            "double_blocks": stored.count("num_layers", MOST_LAYERS),
            "single_blocks": stored.count("num_single_layers", MOST_LAYERS),
            "hidden_size": stored.hidden_size(multiple=2),
            "heads": stored.count("num_attention_heads"),
            "in_channels": in_channels,
            "context_channels": in_channels - out_channels,
            "joint_size": stored.count("joint_attention_dim"),
            "pooled_size": stored.count("pooled_projection_dim"),
            "rope_axes": axes,
        }
        if stored.flag("guidance_embeds") != (self.guidance is not None):
            distilled = self.guidance is None
            fields |= {"guidance": 3.5 if distilled else None}
            fields |= {"text_tokens": 512 if distilled else 256}
        return fields

    @classmethod
    def sampling_of(cls, config: Mapping[str, Any]) -> SamplingDefaults:
        """Return the defaults of diffusers' pipeline, and for models without embedded guidance those of schnell."""
        distilled = bool(config["guidance_embeds"])
        in_channels = config.get("in_channels", DEFAULTS["in_channels"])
        fills = in_channels > 2 * (config.get("out_channels") or in_channels)  # with a masked picture and its mask
        steps, guidance = (50, 30.0) if fills else (28, 3.5)
        return SamplingDefaults(
            steps=steps if distilled else 4,
            guidance=guidance if distilled else None,
            scheduler={"use_dynamic_shifting": distilled},
        )

    @property
    def sampling(self) -> SamplingDefaults:
        return super().sampling._replace(guidance=self.guidance)

    def with_guidance(self, scale: float | None) -> Self:
        return replace(self, guidance=scale)

    def with_tokens(self, tokens: int) -> Self:
        return replace(self, side=isqrt(tokens))

    def for_noise(self) -> Self:
        """Return the preset at 128 px and 32 text tokens at most."""
        return replace(self, side=min(self.side, 8), text_tokens=min(self.text_tokens, 32))


_RECIPE = replace(LOW_RANK_FINETUNING, calibration=SPARSE)

PRESETS: tuple[Preset, ...] = (
    FluxPreset(
        name="flux",
        hub_id="black-forest-labs/FLUX.1-dev",
        about="FLUX.1-dev, guidance-distilled",
        recipe=_RECIPE,
    ),
    FluxPreset(
        name="flux-schnell",
        text_tokens=256,
        guidance=None,
        hub_id="black-forest-labs/FLUX.1-schnell",
        about="FLUX.1-schnell, 1 to 4 steps",
        recipe=_RECIPE,
    ),
    FluxPreset(
        name="flux-lite",
        double_blocks=8,
        hub_id="Freepik/flux.1-lite-8B",
        about="FLUX.1-lite 8B, guidance-distilled",
        recipe=_RECIPE,
    ),
    FluxPreset(
        name="flux-kontext",
        hub_id="black-forest-labs/FLUX.1-Kontext-dev",
        about="FLUX.1-Kontext-dev, edits pictures",
        recipe=_RECIPE,
    ),
    FluxPreset(
        name="flux-krea",
        hub_id="black-forest-labs/FLUX.1-Krea-dev",
        about="FLUX.1-Krea-dev, guidance-distilled",
        recipe=_RECIPE,
    ),
    FluxPreset(
        name="flux-fill",
        in_channels=384,
        context_channels=320,
        guidance=30.0,
        hub_id="black-forest-labs/FLUX.1-Fill-dev",
        about="FLUX.1-Fill-dev, fills masked parts of pictures",
        recipe=_RECIPE,
    ),
    FluxPreset(
        name="flux-tiny",
        hidden_size=128,
        heads=4,
        in_channels=16,
        double_blocks=2,
        single_blocks=3,
        side=8,
        text_tokens=16,
        joint_size=64,
        pooled_size=32,
        rope_axes=(8, 12, 12),
        about="FLUX in small, for trying things out on a CPU",
    ),
)
