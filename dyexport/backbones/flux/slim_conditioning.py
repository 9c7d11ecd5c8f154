"""FLUX's conditioning network: everything that depends on sigma, guidance and the pooled text alone.

A quarter of FLUX's weights. It makes the adaLN parameters of every block and what token routers multiply by.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyexport.lora import LoraSpec
from dyexport.slicing.slim_layers import embed_sinusoid, scales_from_one
from dyexport.slicing.slim_lora import GateRouters, gates_size

STREAM_PARTS = 6  # of image and of text in a double block: shift, scale and gate of attention and of the FFN
SINGLE_PARTS = 3  # shift, scale, gate
FINAL_PARTS = 2  # scale, shift
ROUTER_PARTS = 2  # weights of an image token and of the mean text token


def channels_of(config: Mapping[str, Any]) -> int:
    channels: int = config["num_attention_heads"] * config["attention_head_dim"]
    return channels


def depth_of(config: Mapping[str, Any]) -> int:
    depth: int = config["num_layers"] + config["num_single_layers"]
    return depth


def modulation_size(config: Mapping[str, Any], *, token_routers: bool, td_lora: LoraSpec | None) -> int:
    """M: vectors of C channels for every block, the token routers and the final layer, L constants, L * E gates."""
    depth = depth_of(config)
    parts = 2 * STREAM_PARTS * config["num_layers"] + SINGLE_PARTS * config["num_single_layers"] + FINAL_PARTS
    routers = depth * (ROUTER_PARTS * channels_of(config) + 1) if token_routers else 0
    return parts * channels_of(config) + routers + gates_size(td_lora, depth)


class Embedder(nn.Module):
    """Linear -> SiLU -> Linear."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.inner = nn.Linear(inputs, channels)
        self.outer = nn.Linear(channels, channels)

    def forward(self, value: Tensor) -> Tensor:
        out: Tensor = self.outer(F.silu(self.inner(value.to(self.inner.weight.dtype))))
        return out


class RouterConditioning(nn.Module):
    """What the conditioning makes of a token router: logit = norm(image) . a + mean(norm(text)) . b + c."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear_t = nn.Linear(channels, 4 * channels)
        self.norm_weight = nn.Parameter(torch.empty(channels))
        self.norm_bias = nn.Parameter(torch.empty(channels))
        self.router = nn.Linear(channels, 1)

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """(R, C) -> a and b (R, 2 C), c (R, 1)."""
        shift, scale, text_shift, text_scale = self.linear_t(embedding).float().chunk(4, dim=1)  # (R, C)
        scale, text_scale = scale + 1, text_scale + 1
        weights = self.router.weight * self.norm_weight  # (1, C)
        offset = self.norm_bias * (scale + text_scale) + shift + text_shift  # (R, C)
        return torch.cat([weights * scale, weights * text_scale], dim=1), self.router(offset)


class FluxConditioning(nn.Module):
    """Every adaLN parameter and token router's weights, from sigma, guidance and the pooled text."""

    def __init__(self, config: Mapping[str, Any], *, token_routers: bool, td_lora: LoraSpec | None) -> None:
        super().__init__()
        channels = channels_of(config)
        self.frequencies = nn.Parameter(torch.empty(128))
        self.time = Embedder(256, channels)
        self.guidance = Embedder(256, channels) if config["guidance_embeds"] else None
        self.pooled = Embedder(config["pooled_projection_dim"], channels)
        widths = [2 * STREAM_PARTS] * config["num_layers"] + [SINGLE_PARTS] * config["num_single_layers"]
        streams = 2 * config["num_layers"]
        self.streams = nn.ModuleList(nn.Linear(channels, STREAM_PARTS * channels) for _ in range(streams))
        self.singles = nn.ModuleList(
            nn.Linear(channels, SINGLE_PARTS * channels) for _ in range(config["num_single_layers"])
        )
        self.final = nn.Linear(channels, FINAL_PARTS * channels)
        self.routers = nn.ModuleList(RouterConditioning(channels) for _ in widths if token_routers)
        self.experts = GateRouters(channels, len(widths), td_lora.experts) if td_lora else None

    def forward(self, timestep: Tensor, pooled_projections: Tensor, guidance: Tensor | None = None) -> Tensor:
        """sigma (R,), pooled text (R, P), guidance (R,) -> (R, M), scales with their 1 added."""
        time = self.time(embed_sinusoid(timestep * 1000, self.frequencies))  # (R, C)
        embedding = F.silu(self.conditioned(time, pooled_projections, guidance))  # (R, C)
        parts = [part for stream in self.streams for part in scales_from_one(stream(embedding), STREAM_PARTS)]
        parts += [part for single in self.singles for part in scales_from_one(single(embedding), SINGLE_PARTS)]
        routers = [router(embedding) for router in self.routers]
        parts += [weights for weights, _ in routers]
        scale, shift = self.final(embedding).float().chunk(FINAL_PARTS, dim=1)  # (R, C)
        parts += [shift, scale + 1, *(constant for _, constant in routers)]
        return torch.cat(parts if self.experts is None else [*parts, self.experts(time)], dim=1)

    def conditioned(self, time: Tensor, pooled: Tensor, guidance: Tensor | None) -> Tensor:
        """The timestep's embedding (R, C), and those of the pooled text and of the guidance: (R, C)."""
        embedding: Tensor = time + self.pooled(pooled)
        if self.guidance is None or guidance is None:
            return embedding
        conditioned: Tensor = embedding + self.guidance(embed_sinusoid(guidance * 1000, self.frequencies))
        return conditioned
