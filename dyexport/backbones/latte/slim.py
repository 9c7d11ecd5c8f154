"""The slim Latte: blocks over space and blocks over time in turn, of the same parts as DiT's.

The tokens of all frames stay in one order, frame by frame, through the whole network: (B, F * N, C). Only
attention over time looks at them patch by patch. What depends on t alone is the conditioning network; the
text enters here, once a sample, where the stock module projects it anew for each frame.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyexport.backbones.dit.slim import BLOCK_PARTS, FINAL_PARTS, SlimBlock
from dyexport.bundle.manifest import Segment
from dyexport.lora import LoraSpec
from dyexport.slicing.slim_layers import (
    Gates,
    embed_sinusoid,
    gated_update,
    modulated_norm,
    scales_from_one,
)
from dyexport.slicing.slim_lora import GateRouters, lora_paths, with_experts

SHARED_PARTS = BLOCK_PARTS + FINAL_PARTS


class LatteConditioning(nn.Module):
    """adaLN-single: the six vectors that all blocks add their own to, and the final layer's two."""

    def __init__(self, config: Mapping[str, Any], *, td_lora: LoraSpec | None) -> None:
        super().__init__()
        channels = config["num_attention_heads"] * config["attention_head_dim"]
        self.frequencies = nn.Parameter(torch.empty(128))
        self.time_in = nn.Linear(256, channels)
        self.time_out = nn.Linear(channels, channels)
        self.blocks = nn.Linear(channels, BLOCK_PARTS * channels)
        self.table = nn.Parameter(torch.empty(FINAL_PARTS, channels))
        self.experts = GateRouters(channels, 2 * config["num_layers"], td_lora.experts) if td_lora else None

    def forward(self, timestep: Tensor) -> Tensor:
        """t (R,) -> (R, 8 C), scales with their 1 added, then gates of L * E experts."""
        sinusoid = embed_sinusoid(timestep, self.frequencies).to(self.time_in.weight.dtype)  # (R, 256)
        embedding = self.time_out(F.silu(self.time_in(sinusoid)))  # (R, C)
        blocks = scales_from_one(self.blocks(F.silu(embedding)), BLOCK_PARTS)  # 6 x (R, C)
        final = (embedding.unsqueeze(1) + self.table).flatten(1)  # (R, 2 C)
        parts = [*blocks, *scales_from_one(final, FINAL_PARTS)]
        return torch.cat(parts if self.experts is None else [*parts, self.experts(embedding)], dim=1)


class Grid(NamedTuple):
    """How the tokens of a video lie."""

    frames: int
    height: int
    width: int

    @property
    def patches(self) -> int:
        """Tokens of a frame, N."""
        return self.height * self.width


class LatteBlock(SlimBlock, ABC):
    """A block whose modulation is that of all blocks plus a table of its own."""

    def __init__(
        self, config: Mapping[str, Any], segment: Segment, index: int, *, group_size: int, td_lora: LoraSpec | None
    ) -> None:
        super().__init__(config, segment, index, group_size=group_size, td_lora=td_lora)
        self.table = nn.Parameter(torch.empty(BLOCK_PARTS, config["num_attention_heads"] * self.head_dim))

    def forward(
        self, hidden: Tensor, text: Tensor, modulation: Tensor, gates: Gates, slots: int, grid: Grid
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, F * N, C), text (B, T, C), (1, 6, C) -> tokens, and those wanted (B,) where room is limited."""
        parts = (modulation + self.table).split(1, dim=1)  # 6 x (1, 1, C)
        normed = modulated_norm(hidden, parts[0], parts[1], self.mlp_eps)  # (B, F * N, C)
        hidden = gated_update(hidden, parts[2], self.mix(normed, gates, grid))  # (B, F * N, C)
        return self.feed(self.read(hidden, text), parts[3:], gates, slots)

    @abstractmethod
    def mix(self, normed: Tensor, gates: Gates, grid: Grid) -> Tensor:
        """Self-attention along one axis: (B, F * N, C) -> (B, F * N, C)."""

    def read(self, hidden: Tensor, text: Tensor) -> Tensor:
        """What the text adds: (B, F * N, C), (B, T, C) -> (B, F * N, C)."""
        return hidden


class SpatialBlock(LatteBlock):
    """Patches of a frame attend to each other, then to the text."""

    def __init__(
        self, config: Mapping[str, Any], segment: Segment, index: int, *, group_size: int, td_lora: LoraSpec | None
    ) -> None:
        super().__init__(config, segment, index, group_size=group_size, td_lora=td_lora)
        self.to_text = TextAttention(config["num_attention_heads"], self.head_dim)

    def mix(self, normed: Tensor, gates: Gates, grid: Grid) -> Tensor:
        rows = normed.view(-1, grid.patches, normed.shape[2])  # (B * F, N, C)
        return self.attend(rows, gates).view(normed.shape)

    def read(self, hidden: Tensor, text: Tensor) -> Tensor:
        update: Tensor = self.to_text(hidden, text)
        return hidden + update


class TemporalBlock(LatteBlock):
    """Patches at one place attend to each other through time."""

    def mix(self, normed: Tensor, gates: Gates, grid: Grid) -> Tensor:
        batch, _, channels = normed.shape
        frames = normed.view(batch, grid.frames, grid.patches, channels)
        rows = self.attend(frames.transpose(1, 2).flatten(0, 1), gates)  # (B * N, F, C)
        return rows.view(batch, grid.patches, grid.frames, channels).transpose(1, 2).reshape(normed.shape)


class TextAttention(nn.Module):
    """Attention of every token to the text, at full width whatever the segment."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        channels = heads * head_dim
        self.heads, self.head_dim = heads, head_dim
        self.query = nn.Linear(channels, channels)  # scaled
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, hidden: Tensor, text: Tensor) -> Tensor:
        """(B, M, C), (B, T, C) -> (B, M, C)."""
        query = self.split(self.query, hidden)  # (B, H, M, D)
        key, value = self.split(self.key, text), self.split(self.value, text)  # (B, H, T, D)
        mixed = F.scaled_dot_product_attention(query, key, value, scale=1.0)  # (B, H, M, D)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2).flatten(0, 1))  # (B * M, C)
        return out.view(hidden.shape)

    def split(self, linear: nn.Linear, tokens: Tensor) -> Tensor:
        """(B, S, C) -> (B, H, S, D)."""
        heads = linear(tokens.flatten(0, 1)).view(*tokens.shape[:2], self.heads, self.head_dim)
        return heads.transpose(1, 2)


class Caption(nn.Module):
    """The text encoder's output made as wide as the network."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.inner = nn.Linear(inputs, channels)
        self.outer = nn.Linear(channels, channels)

    def forward(self, text: Tensor) -> Tensor:
        """(B, T, J) -> (B, T, C)."""
        rows: Tensor = self.outer(F.gelu(self.inner(text.flatten(0, 1)), approximate="tanh"))  # (B * T, C)
        return rows.view(*text.shape[:2], -1)


class Positions(nn.Module):
    """Sinusoids of place and of time: those of diffusers at any size of a frame, for any number of frames."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        channels = config["num_attention_heads"] * config["attention_head_dim"]
        side = config["sample_size"] // config["patch_size"]
        # Coordinates span the square of training, whatever the size of a frame.
        self.span = side / max(config["sample_size"] // 64, 1)
        self.spatial = nn.Parameter(torch.empty(channels // 4))
        self.temporal = nn.Parameter(torch.empty(channels // 2))

    def of_patches(self, grid: Grid) -> Tensor:
        """(N, C): the column in the first half of the channels, the row in the second."""
        columns, rows = self._sinusoids(grid.width).unsqueeze(0), self._sinusoids(grid.height).unsqueeze(1)
        size = (grid.height, grid.width, columns.shape[2])
        return torch.cat([columns.expand(size), rows.expand(size)], dim=2).flatten(0, 1)

    def _sinusoids(self, size: int) -> Tensor:
        """Of one axis: (S, C / 2)."""
        places = self._count(size, self.spatial) * self.span / size  # (S,)
        return _sines_first(places, self.spatial)

    def of_frames(self, frames: int) -> Tensor:
        """(F, C); nothing where there is one frame, a picture."""
        index = self._count(frames, self.temporal)  # (F,)
        several = index.amax(0).clamp(max=1)
        return several * _sines_first(index, self.temporal)

    @staticmethod
    def _count(size: int, like: Tensor) -> Tensor:
        return torch.arange(size, dtype=like.dtype, device=like.device)


def _sines_first(places: Tensor, frequencies: Tensor) -> Tensor:
    """(S,), (K,) -> (S, 2 K)."""
    angles = places.unsqueeze(1) * frequencies  # (S, K)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class SlimLatte(nn.Module):
    """A Latte at the widths of one segment, without its conditioning network."""

    def __init__(
        self, config: Mapping[str, Any], segment: Segment, *, group_size: int, td_lora: LoraSpec | None
    ) -> None:
        super().__init__()
        self.segment, self.td_lora = segment, td_lora
        channels = config["num_attention_heads"] * config["attention_head_dim"]
        self.patch_size, self.out_channels = config["patch_size"], config["out_channels"]
        self.patch = nn.Conv2d(config["in_channels"], channels, self.patch_size, stride=self.patch_size)
        self.positions = Positions(config)
        self.caption = Caption(config["caption_channels"], channels)
        kinds = [SpatialBlock, TemporalBlock] * config["num_layers"]
        paths = lora_paths(td_lora, segment)
        self.blocks = nn.ModuleList(
            kind(config, segment, index, group_size=group_size, td_lora=paths) for index, kind in enumerate(kinds)
        )
        self.final = nn.Linear(channels, self.patch_size**2 * self.out_channels)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        modulation: Tensor,
        width_gate: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Latents (B, C_in, F, H, W), text (B, T, J), modulation (1, M), gates (W,), slots (S,).

        Returns sample (B, C_out, F, H, W) and, where R token routers have limited room, what they wanted (B, R).
        """
        hidden, grid = self.embed(hidden_states)  # (B, F * N, C)
        text = self.caption(encoder_hidden_states.to(hidden.dtype))  # (B, T, C)
        vectors = modulation[:, : SHARED_PARTS * hidden.shape[2]].unflatten(1, (SHARED_PARTS, -1))  # (1, 8, C)
        extra = 0 if slots is None else slots.shape[0]
        counts = []
        for index, gates in enumerate(with_experts(self.segment, width_gate, modulation, self.td_lora)):
            if index == 1:  # where the stock module adds it
                hidden = self.in_time(hidden, grid)  # (B, F * N, C)
            hidden, kept = self.blocks[index](hidden, text, vectors[:, :BLOCK_PARTS], gates, extra, grid)
            if kept is not None:
                counts.append(kept)
        shift, scale = vectors[:, BLOCK_PARTS:].split(1, dim=1)  # (1, 1, C)
        sample = self.unpatchify(modulated_norm(hidden, shift, scale), grid)  # (B, C_out, F, H, W)
        return (sample, torch.stack(counts, dim=1)) if counts else (sample,)

    def embed(self, latents: Tensor) -> tuple[Tensor, Grid]:
        """Patches in their places: (B, C_in, F, H, W) -> (B, F * N, C)."""
        batch, _, frames = latents.shape[:3]
        patches = self.patch(latents.transpose(1, 2).flatten(0, 1))  # (B * F, C, h, w)
        grid = Grid(frames, patches.shape[2], patches.shape[3])
        hidden = patches.flatten(2).transpose(1, 2) + self.positions.of_patches(grid)  # (B * F, N, C)
        return hidden.reshape(batch, frames * grid.patches, -1).to(self.final.weight.dtype), grid

    def in_time(self, hidden: Tensor, grid: Grid) -> Tensor:
        """Frames in their places: (B, F * N, C) -> (B, F * N, C)."""
        places = self.positions.of_frames(grid.frames).to(hidden.dtype).unsqueeze(1)  # (F, 1, C)
        return (hidden.view(-1, grid.frames, grid.patches, hidden.shape[2]) + places).view(hidden.shape)

    def unpatchify(self, normed: Tensor, grid: Grid) -> Tensor:
        """Final layer: (B, F * N, C) -> (B, C_out, F, H, W)."""
        size, channels = self.patch_size, self.out_channels
        patches = self.final(normed.flatten(0, 1)).float()  # (B * F * N, P * P * C_out)
        patches = patches.view(-1, grid.frames, grid.height, grid.width, size, size, channels)
        pixels = patches.permute(0, 6, 1, 2, 4, 3, 5)  # (B, C_out, F, h, P, w, P)
        return pixels.reshape(-1, channels, grid.frames, grid.height * size, grid.width * size)
