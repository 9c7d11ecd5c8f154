"""The slim Latte: alternating blocks over space and over time, made of DiT's slim blocks.

The tokens of all frames stay in one order, frame by frame, through the whole network: (B, F * N, C). Only
attention over time reads them patch by patch. Text enters here and is projected once per sample, where the stock
module projects it again for each frame.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyexport.backbones.base import channels_of
from dyexport.backbones.dit.slim import SlimBlock
from dyexport.backbones.latte.slim_conditioning import LatteLayout
from dyexport.bundle.plan import Segment
from dyexport.lora import LoraSpec
from dyexport.slicing.linears import SlimLinear
from dyexport.slicing.modulation import BlockModulation, gated_update, modulated_norm
from dyexport.slicing.slim_layers import BlockSizes, Gates, split_gates
from dyexport.slicing.slim_lora import lora_paths


class Grid(NamedTuple):
    """Numbers of frames, rows and columns of a video's tokens."""

    frames: int
    height: int
    width: int

    @property
    def patches(self) -> int:
        """Number of tokens in a frame, N."""
        return self.height * self.width


class LatteBlock(SlimBlock, ABC):
    """A block that adds its own table to the modulation that all blocks share."""

    def __init__(self, sizes: BlockSizes, *, mlp_eps: float, td_lora: LoraSpec | None) -> None:
        super().__init__(sizes, mlp_eps=mlp_eps, td_lora=td_lora)
        self.table = nn.Parameter(torch.empty(6, sizes.channels, dtype=torch.float32))

    def forward(
        self, hidden: Tensor, text: Tensor, shared: BlockModulation, gates: Gates, slots: int, grid: Grid
    ) -> tuple[Tensor, Tensor | None]:
        """Compute tokens (B, F * N, C), text (B, T, C) -> tokens, and those kept (B,) where capacity is limited."""
        own = self.table.split(1, dim=0)  # 6 x (1, C)
        vectors = (vector + row for vector, row in zip(shared.vectors, own, strict=True))  # 6 x (1, 1, C)
        modulation = BlockModulation.take(vectors)
        normed = modulated_norm(hidden, modulation.attention, self.mlp_eps)  # (B, F * N, C)
        hidden = gated_update(hidden, modulation.attention.gate, self.mix(normed, gates, grid))  # (B, F * N, C)
        return self.feed(self.read(hidden, text), modulation.mlp, gates, slots)

    @abstractmethod
    def mix(self, normed: Tensor, gates: Gates, grid: Grid) -> Tensor:
        """Run self-attention along one axis: (B, F * N, C) -> (B, F * N, C)."""

    def read(self, hidden: Tensor, text: Tensor) -> Tensor:
        """Add what the block reads from the text: (B, F * N, C), (B, T, C) -> (B, F * N, C)."""
        return hidden


class SpatialBlock(LatteBlock):
    """Patches of a frame attend to each other, then to the text."""

    def __init__(self, sizes: BlockSizes, *, mlp_eps: float, td_lora: LoraSpec | None) -> None:
        super().__init__(sizes, mlp_eps=mlp_eps, td_lora=td_lora)
        self.to_text = TextAttention(sizes.channels // sizes.head_dim, sizes.head_dim)

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
    """Attention of every token to the text, at full width in every segment."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        channels = heads * head_dim
        self.heads, self.head_dim = heads, head_dim
        self.query = SlimLinear(channels, channels)  # scaled
        self.key = SlimLinear(channels, channels)
        self.value = SlimLinear(channels, channels)
        self.out = SlimLinear(channels, channels)

    def forward(self, hidden: Tensor, text: Tensor) -> Tensor:
        """Compute (B, M, C), (B, T, C) -> (B, M, C)."""
        query = self.split(self.query, hidden)  # (B, H, M, D)
        key, value = self.split(self.key, text), self.split(self.value, text)  # (B, H, T, D)
        mixed = F.scaled_dot_product_attention(query, key, value, scale=1.0)  # (B, H, M, D)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2).flatten(0, 1))  # (B * M, C)
        return out.view(hidden.shape)

    def split(self, linear: SlimLinear, tokens: Tensor) -> Tensor:
        """Compute (B, S, C) -> (B, H, S, D)."""
        heads: Tensor = linear(tokens.flatten(0, 1)).view(*tokens.shape[:2], self.heads, self.head_dim)
        return heads.transpose(1, 2)


class Caption(nn.Module):
    """MLP that projects the text encoder's output to the network's channels."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.inner = nn.Linear(inputs, channels)
        self.outer = nn.Linear(channels, channels)

    def forward(self, text: Tensor) -> Tensor:
        """Compute (B, T, J) -> (B, T, C)."""
        rows: Tensor = self.outer(F.gelu(self.inner(text.flatten(0, 1)), approximate="tanh"))  # (B * T, C)
        return rows.view(*text.shape[:2], -1)


class Positions(nn.Module):
    """Sinusoidal embeddings of place and time, equal to diffusers' for frames of any size and number."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        channels = channels_of(config)
        side = config["sample_size"] // config["patch_size"]
        # Coordinates span the square of training, for frames of any size.
        self.span = side / max(config["sample_size"] // 64, 1)
        self.spatial = nn.Parameter(torch.empty(channels // 4, dtype=torch.float32))
        self.temporal = nn.Parameter(torch.empty(channels // 2, dtype=torch.float32))

    def of_patches(self, grid: Grid) -> Tensor:
        """Compute the embeddings of places (N, C): columns in the first half of the channels, rows in the second."""
        columns, rows = self._sinusoids(grid.width).unsqueeze(0), self._sinusoids(grid.height).unsqueeze(1)
        size = (grid.height, grid.width, columns.shape[2])
        return torch.cat([columns.expand(size), rows.expand(size)], dim=2).flatten(0, 1)

    def _sinusoids(self, size: int) -> Tensor:
        """Compute the sinusoids of one axis: (S, C / 2)."""
        places = self._count(size, self.spatial) * self.span / size  # (S,)
        return _sines_first(places, self.spatial)

    def of_frames(self, frames: int) -> Tensor:
        """Compute the embeddings of frames (F, C): zero for a single frame, a picture."""
        index = self._count(frames, self.temporal)  # (F,)
        several = index.amax(0).clamp(max=1)
        return several * _sines_first(index, self.temporal)

    @staticmethod
    def _count(size: int, like: Tensor) -> Tensor:
        return torch.arange(size, dtype=like.dtype, device=like.device)


def _sines_first(places: Tensor, frequencies: Tensor) -> Tensor:
    """Compute (S,), (K,) -> (S, 2 K)."""
    angles = places.unsqueeze(1) * frequencies  # (S, K)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class SlimLatte(nn.Module):
    """A Latte at the widths of one segment, without its conditioning network."""

    def __init__(
        self, config: Mapping[str, Any], segment: Segment, *, group_size: int, td_lora: LoraSpec | None
    ) -> None:
        super().__init__()
        self.segment, self.layout = segment, LatteLayout.of(config, td_lora)
        channels = channels_of(config)
        self.patch_size, self.out_channels = config["patch_size"], config["out_channels"]
        # Opset 20 has no convolution in bf16.
        self.patch = nn.Conv2d(
            config["in_channels"], channels, self.patch_size, stride=self.patch_size, dtype=torch.float32
        )
        self.positions = Positions(config)
        self.caption = Caption(config["caption_channels"], channels)
        self.blocks = nn.ModuleList()
        for index in range(segment.depth):
            kind = TemporalBlock if index % 2 else SpatialBlock
            sizes = BlockSizes.of(config, segment, index, group_size=group_size)
            self.blocks.append(kind(sizes, mlp_eps=config["norm_eps"], td_lora=lora_paths(td_lora, segment)))
        self.final = nn.Linear(channels, self.patch_size**2 * self.out_channels)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        modulation: Tensor,
        width_gate: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Compute latents (B, C_in, F, H, W), text (B, T, J), modulation (1, M) -> sample (B, C_out, F, H, W).

        ``width_gate`` is (W,), ``slots`` (S,). Also returns the kept tokens (B, R) of the R blocks whose capacity is
        limited, if there are any.
        """
        hidden, grid = self.embed(hidden_states)  # (B, F * N, C)
        text = self.caption(encoder_hidden_states.to(hidden.dtype))  # (B, T, C)
        parts = self.layout.split(modulation)
        gates = split_gates(self.segment, width_gate, parts.experts)
        extra = 0 if slots is None else slots.shape[0]
        counts = []
        for index, (block, gate) in enumerate(zip(self.blocks, gates, strict=True)):
            if index == 1:  # where the stock module adds it
                hidden = self.in_time(hidden, grid)  # (B, F * N, C)
            hidden, kept = block(hidden, text, parts.shared, gate, extra, grid)
            if kept is not None:
                counts.append(kept)
        sample = self.unpatchify(modulated_norm(hidden, parts.final), grid)  # (B, C_out, F, H, W)
        return (sample, torch.stack(counts, dim=1)) if counts else (sample,)

    def embed(self, latents: Tensor) -> tuple[Tensor, Grid]:
        """Embed patches and their places: (B, C_in, F, H, W) -> (B, F * N, C)."""
        batch, _, frames = latents.shape[:3]
        patches = self.patch(latents.transpose(1, 2).flatten(0, 1))  # (B * F, C, h, w)
        grid = Grid(frames, patches.shape[2], patches.shape[3])
        hidden = patches.flatten(2).transpose(1, 2) + self.positions.of_patches(grid)  # (B * F, N, C)
        return hidden.reshape(batch, frames * grid.patches, -1).to(self.final.weight.dtype), grid

    def in_time(self, hidden: Tensor, grid: Grid) -> Tensor:
        """Add the embeddings of frames: (B, F * N, C) -> (B, F * N, C)."""
        places = self.positions.of_frames(grid.frames).to(hidden.dtype).unsqueeze(1)  # (F, 1, C)
        return (hidden.view(-1, grid.frames, grid.patches, hidden.shape[2]) + places).view(hidden.shape)

    def unpatchify(self, normed: Tensor, grid: Grid) -> Tensor:
        """Run the final layer: (B, F * N, C) -> (B, C_out, F, H, W)."""
        size, channels = self.patch_size, self.out_channels
        patches = self.final(normed.flatten(0, 1)).float()  # (B * F * N, P * P * C_out)
        patches = patches.view(-1, grid.frames, grid.height, grid.width, size, size, channels)
        pixels = patches.permute(0, 6, 1, 2, 4, 3, 5)  # (B, C_out, F, h, P, w, P)
        return pixels.reshape(-1, channels, grid.frames, grid.height * size, grid.width * size)
