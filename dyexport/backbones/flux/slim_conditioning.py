"""FLUX's conditioning network: everything that depends on sigma, guidance and the pooled text alone.

A quarter of FLUX's weights. It computes the adaLN modulation of every block, and the weights of token routers of the
published kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyexport.backbones.base import channels_of
from dyexport.backbones.flux.masked import TIMESTEP_SCALE
from dyexport.lora import LoraSpec
from dyexport.slicing.modulation import (
    BlockModulation,
    FinalModulation,
    Modulation,
    ModulationLayout,
    TimestepConditioning,
    embed_sinusoid,
    experts_in,
    take_final,
    take_modulation,
)

ROUTER_EPS = 1e-5


def depth_of(config: Mapping[str, Any]) -> int:
    """Return the number of blocks, double and single."""
    depth: int = config["num_layers"] + config["num_single_layers"]
    return depth


class DoubleModulation(NamedTuple):
    """Modulation of a double block's two streams."""

    image: BlockModulation
    text: BlockModulation


class RouterWeights(NamedTuple):
    """Weights of a published token router at one sigma: (R, C) in the conditioning network, (B, 1, C) in a block."""

    image: Tensor
    text: Tensor
    constant: Tensor  # (R, 1)

    def scores(self, image: Tensor, text: Tensor) -> Tensor:
        """Compute logits of image tokens (B, N, C), given text tokens (B, T, C): (B, N)."""
        channels = image.shape[-1:]
        text_mean = F.layer_norm(text.float(), channels, eps=ROUTER_EPS).mean(1)  # (B, C)
        offset = (text_mean * self.text.squeeze(1)).sum(1, keepdim=True) + self.constant  # (B, 1)
        normed = F.layer_norm(image.float(), channels, eps=ROUTER_EPS)  # (B, N, C)
        return (normed @ self.image.transpose(1, 2)).squeeze(2) + offset


class FluxModulation(NamedTuple):
    """Modulation of every block and of the final layer, token routers, and the gates of TD-LoRA's experts."""

    doubles: list[DoubleModulation]
    singles: list[Modulation]
    routers: list[RouterWeights]  # of every block; empty without published token routers
    final: FinalModulation
    experts: Tensor | None


@dataclass(frozen=True, kw_only=True)
class FluxLayout(ModulationLayout):
    """Double blocks (image, text), single blocks, published token routers, the final layer; then their constants."""

    doubles: int
    published_routers: bool

    @classmethod
    def of(cls, config: Mapping[str, Any], *, published_routers: bool, td_lora: LoraSpec | None) -> Self:
        """Return the layout of a configuration."""
        return cls(
            channels=channels_of(config),
            depth=depth_of(config),
            experts=experts_in(td_lora),
            doubles=config["num_layers"],
            published_routers=published_routers,
        )

    @property
    def vectors(self) -> int:
        routers = 2 * self.depth if self.published_routers else 0
        return 12 * self.doubles + 3 * (self.depth - self.doubles) + routers + 2

    @property
    def values(self) -> int:
        return self.depth if self.published_routers else 0

    def pack(self, modulation: FluxModulation) -> Tensor:
        """Pack vectors (R, C), constants (R, 1) and expert gates (R, L * E) to (R, M)."""
        vectors = [vector for double in modulation.doubles for stream in double for vector in stream.vectors]
        vectors += [vector for single in modulation.singles for vector in single]
        vectors += [vector for router in modulation.routers for vector in (router.image, router.text)]
        constants = [router.constant for router in modulation.routers]
        return self.join([*vectors, *modulation.final], constants, modulation.experts)

    def split(self, modulation: Tensor) -> FluxModulation:
        """Split (B, M) into vectors (B, 1, C), constants (B, 1) and expert gates (L, E)."""
        vectors = self.vectors_of(modulation)
        doubles = [
            DoubleModulation(BlockModulation.take(vectors), BlockModulation.take(vectors)) for _ in range(self.doubles)
        ]
        singles = [take_modulation(vectors) for _ in range(self.depth - self.doubles)]
        constants = self.values_of(modulation) if self.published_routers else ()
        routers = [RouterWeights(next(vectors), next(vectors), constant) for constant in constants]
        return FluxModulation(doubles, singles, routers, take_final(vectors), self.experts_of(modulation))


class Embedder(nn.Module):
    """Linear -> SiLU -> Linear."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.inner = nn.Linear(inputs, channels)
        self.outer = nn.Linear(channels, channels)

    def forward(self, value: Tensor) -> Tensor:
        """Compute (R, in) -> (R, C)."""
        out: Tensor = self.outer(F.silu(self.inner(value.to(self.inner.weight.dtype))))
        return out


class RouterConditioning(nn.Module):
    """Weights of a published token router: logit = norm(image) . a + mean(norm(text)) . b + c."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear_t = nn.Linear(channels, 4 * channels)
        self.norm_weight = nn.Parameter(torch.empty(channels, dtype=torch.float32))
        self.norm_bias = nn.Parameter(torch.empty(channels, dtype=torch.float32))
        self.router = nn.Linear(channels, 1, dtype=torch.float32)

    def forward(self, embedding: Tensor) -> RouterWeights:
        """Compute (R, C) -> a and b (R, C), c (R, 1)."""
        shift, scale, text_shift, text_scale = self.linear_t(embedding).float().chunk(4, dim=1)  # (R, C)
        scale, text_scale = scale + 1, text_scale + 1
        weights = self.router.weight * self.norm_weight  # (1, C)
        offset = self.norm_bias * (scale + text_scale) + shift + text_shift  # (R, C)
        return RouterWeights(weights * scale, weights * text_scale, self.router(offset))


class FluxConditioning(TimestepConditioning):
    """adaLN modulation and published token routers' weights of every block, from sigma, guidance, the pooled text."""

    def __init__(self, config: Mapping[str, Any], *, published_routers: bool, td_lora: LoraSpec | None) -> None:
        channels, depth = channels_of(config), depth_of(config)
        super().__init__(channels, depth, td_lora)
        self.layout = FluxLayout.of(config, published_routers=published_routers, td_lora=td_lora)
        self.guidance = Embedder(256, channels) if config["guidance_embeds"] else None
        self.pooled = Embedder(config["pooled_projection_dim"], channels)
        self.streams = nn.ModuleList(nn.Linear(channels, 6 * channels) for _ in range(2 * config["num_layers"]))
        self.singles = nn.ModuleList(nn.Linear(channels, 3 * channels) for _ in range(config["num_single_layers"]))
        self.final = nn.Linear(channels, 2 * channels)
        self.routers = nn.ModuleList(RouterConditioning(channels) for _ in range(depth if published_routers else 0))

    def forward(self, timestep: Tensor, pooled_projections: Tensor, guidance: Tensor | None = None) -> Tensor:
        """Compute sigma (R,), pooled text (R, P), guidance (R,) -> modulation (R, M)."""
        time = self.embed(timestep * TIMESTEP_SCALE)  # (R, C)
        embedding = F.silu(self.conditioned(time, pooled_projections, guidance))  # (R, C)
        streams = [BlockModulation.of(stream(embedding)) for stream in self.streams]
        scale, shift = self.final(embedding).float().chunk(2, dim=1)  # (R, C)
        modulation = FluxModulation(
            doubles=[DoubleModulation(*pair) for pair in zip(streams[::2], streams[1::2], strict=True)],
            singles=[Modulation.of(single(embedding)) for single in self.singles],
            routers=[router(embedding) for router in self.routers],
            final=FinalModulation(shift, scale + 1),
            experts=self.expert_gates(time),
        )
        return self.layout.pack(modulation)

    def conditioned(self, time: Tensor, pooled: Tensor, guidance: Tensor | None) -> Tensor:
        """Add the embeddings of the pooled text (R, P) and of guidance (R,) to the timestep's (R, C)."""
        embedding: Tensor = time + self.pooled(pooled)
        if self.guidance is None or guidance is None:
            return embedding
        conditioned: Tensor = embedding + self.guidance(embed_sinusoid(guidance * TIMESTEP_SCALE, self.frequencies))
        return conditioned
