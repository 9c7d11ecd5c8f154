"""The slim DiT: a static network from which a segment's unused heads and MLP channels are gone.

Written for export. Activations are 2-D (B * N, C) wherever a Linear reads them, conditioning is
computed once instead of once per block, and query, key and value are one product. The dense network is
the same module with every unit kept, so the two are compared at equal effort.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyexport.bundle import Segment

NORM_EPS = 1e-6  # of diffusers' AdaLayerNormZero and final norm; the MLP's norm has its own


class Gates(NamedTuple):
    """Width gates of one block, absent where its mask is constant over the segment."""

    heads: Tensor | None  # (H',)
    groups: Tensor | None  # (G',)


class Modulation(NamedTuple):
    """adaLN-Zero parameters of one branch, each (B, 1, C) or one row per token."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class TransposedLinear(nn.Module):
    """A Linear stored (in, out), so that the first inputs are a contiguous run of its weight."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, value: Tensor) -> Tensor:
        return torch.addmm(self.bias, value, self.weight)  # (M, out)


class SlimBlock(nn.Module):
    """One adaLN-Zero block at the widths and on the token path of its segment."""

    def __init__(self, config: Mapping[str, Any], segment: Segment, index: int, *, group_size: int) -> None:
        super().__init__()
        head_dim = config["attention_head_dim"]
        channels = config["num_attention_heads"] * head_dim
        self.heads = len(segment.heads[index])
        self.groups = len(segment.groups[index])
        self.head_dim = head_dim
        self.mlp_eps = config["norm_eps"]
        self.path = segment.token_paths[index]
        self.capacity = segment.capacities[index]
        self.modulation = nn.Linear(channels, 6 * channels)
        self.qkv = nn.Linear(channels, 3 * self.heads * head_dim)
        self.out = TransposedLinear(self.heads * head_dim, channels)
        self.fc1 = nn.Linear(channels, self.groups * group_size)
        self.fc2 = TransposedLinear(self.groups * group_size, channels)
        if self.path != "all":
            hidden = max(channels // 16, 1)
            self.router_in = nn.Linear(channels, hidden)
            self.router_out = nn.Linear(hidden, 1)

    def forward(self, hidden: Tensor, conditioning: Tensor, gates: Gates, slots: int) -> tuple[Tensor, Tensor | None]:
        """(B, N, C), (B, C) -> (B, N, C) and the number of tokens the router kept (B,)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            self.modulation(conditioning).unsqueeze(1).chunk(6, dim=2)
        )  # (B, 1, C)
        normed = modulated_norm(hidden, shift1, scale1)  # (B, N, C)
        hidden = hidden + gate1 * self.attend(normed, gates.heads)  # (B, N, C)
        modulation = Modulation(shift2, scale2, gate2)
        if self.path == "all":
            return hidden + self.feed_forward(hidden, modulation, gates.groups), None
        scores = self.router_out(F.relu(self.router_in(hidden.flatten(0, 1)))).view(hidden.shape[:2])  # (B, N)
        keep = (scores > 0).to(hidden.dtype)  # (B, N)
        kept = keep.sum(dim=1).to(torch.int64)  # (B,)
        if self.path == "masked":
            return hidden + keep.unsqueeze(2) * self.feed_forward(hidden, modulation, gates.groups), kept
        feed = self.feed_compact if self.path == "compact" else self.feed_top
        return feed(hidden, scores, modulation, gates.groups, slots), kept

    def attend(self, normed: Tensor, gate: Tensor | None) -> Tensor:
        """Self-attention of the kept heads: (B, N, C) -> (B, N, C)."""
        batch, tokens, channels = normed.shape
        qkv = self.qkv(normed.flatten(0, 1))  # (B * N, H' * 3 * D)
        qkv = qkv.view(batch, tokens, self.heads, 3, self.head_dim).permute(3, 0, 2, 1, 4)  # (3, B, H', N, D)
        query, key, value = qkv.unbind(0)  # (B, H', N, D)
        mixed = F.scaled_dot_product_attention(query, key, value, scale=1.0)  # (B, H', N, D), scaled by query weights
        if gate is not None:
            mixed = mixed * gate.view(1, -1, 1, 1)
        mixed = mixed.transpose(1, 2).reshape(batch * tokens, self.heads * self.head_dim)  # (B * N, H' * D)
        return self.out(mixed).view(batch, tokens, channels)

    def feed_forward(self, hidden: Tensor, modulation: Modulation, gate: Tensor | None) -> Tensor:
        """MLP branch of the kept groups: (..., C) -> (..., C), to be added to the residual."""
        normed = modulated_norm(hidden, modulation.shift, modulation.scale, self.mlp_eps)  # (..., C)
        wide = F.gelu(self.fc1(normed.reshape(-1, normed.shape[-1])), approximate="tanh")  # (M, G' * S)
        if gate is not None:  # after GELU, which is the same for gates of 0 and 1 and cheaper
            wide = (wide.view(-1, self.groups, wide.shape[1] // self.groups) * gate.view(1, -1, 1)).flatten(1)
        update = self.fc2(wide)  # (M, C)
        return modulation.gate * update.view(hidden.shape)

    def feed_top(
        self, hidden: Tensor, scores: Tensor, modulation: Modulation, width: Tensor | None, slots: int
    ) -> Tensor:
        """MLP on the highest-scored tokens of each sample; the other rows of (B, N, C) pass through."""
        batch, tokens, channels = hidden.shape
        count = self.capacity + slots if self.path == "dynamic" else self.capacity
        top, index = scores.topk(count, dim=1, sorted=False)  # (B, K)
        rows = (index + tokens * torch.arange(batch, device=index.device).unsqueeze(1)).flatten()  # (B * K,)
        flat = hidden.reshape(batch * tokens, channels)  # (B * N, C)
        picked = flat.index_select(0, rows).view(batch, count, channels)  # (B, K, C)
        keep = (top > 0).to(hidden.dtype).unsqueeze(2)  # (B, K, 1): spare slots change nothing
        updated = picked + keep * self.feed_forward(picked, modulation, width)  # (B, K, C)
        return flat.index_put((rows,), updated.flatten(0, 1)).view(batch, tokens, channels)

    def feed_compact(
        self, hidden: Tensor, scores: Tensor, modulation: Modulation, width: Tensor | None, slots: int
    ) -> Tensor:
        """MLP on exactly the kept tokens; their number R depends on the data."""
        batch, tokens, channels = hidden.shape
        samples, index = (scores > 0).nonzero().unbind(1)  # (R,), (R,)
        rows = samples * tokens + index  # (R,)
        flat = hidden.reshape(batch * tokens, channels)  # (B * N, C)
        picked = flat.index_select(0, rows)  # (R, C)
        own = Modulation(*(part.squeeze(1).index_select(0, samples) for part in modulation))  # 3 x (R, C)
        return flat.index_put((rows,), picked + self.feed_forward(picked, own, width)).view(hidden.shape)


class SlimDiT(nn.Module):
    """A whole DiT at the widths of one segment."""

    def __init__(self, config: Mapping[str, Any], segment: Segment, *, group_size: int) -> None:
        super().__init__()
        self.segment = segment
        channels = config["num_attention_heads"] * config["attention_head_dim"]
        self.patch_size = config["patch_size"]
        self.grid = config["sample_size"] // self.patch_size
        self.out_channels = config["out_channels"]
        self.patch = nn.Conv2d(config["in_channels"], channels, self.patch_size, stride=self.patch_size)
        self.position = nn.Parameter(torch.empty(1, self.grid**2, channels))
        self.frequencies = nn.Parameter(torch.empty(128))
        self.time_in = nn.Linear(256, channels)
        self.time_out = nn.Linear(channels, channels)
        self.labels = nn.Embedding(config["num_embeds_ada_norm"] + 1, channels)
        self.blocks = nn.ModuleList(
            SlimBlock(config, segment, index, group_size=group_size) for index in range(segment.depth)
        )
        self.final_modulation = nn.Linear(channels, 2 * channels)
        self.final = nn.Linear(channels, self.patch_size**2 * self.out_channels)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        width_gate: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Latents (B, C, H, W), t (B,), labels (B,), gates (W,), slots (S,) -> sample (B, C_out, H, W), kept (B, L).

        ``kept`` is what the token routers wanted, before any capacity; absent without token routers.
        """
        hidden = self.patch(hidden_states).flatten(2).transpose(1, 2) + self.position  # (B, N, C)
        conditioning = F.silu(self.embed_time(timestep) + self.labels(class_labels))  # (B, C)
        extra = 0 if slots is None else slots.shape[0]
        counts = []
        for block, gates in zip(self.blocks, self.split_gates(width_gate), strict=True):
            hidden, kept = block(hidden, conditioning, gates, extra)
            if kept is not None:
                counts.append(kept)
        sample = self.unpatchify(hidden, conditioning)  # (B, C_out, H, W)
        return (sample, torch.stack(counts, dim=1)) if counts else (sample,)

    def embed_time(self, timestep: Tensor) -> Tensor:
        """(B,) -> (B, C). Frequencies are stored: an exp of another library would move the phase at t ~ 1000."""
        angles = timestep.unsqueeze(1) * self.frequencies  # (B, 128)
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=1)  # (B, 256)
        return self.time_out(F.silu(self.time_in(sinusoid)))

    def split_gates(self, width_gate: Tensor | None) -> list[Gates]:
        """Cut the gate vector into blocks, in the order of ``Segment.width_gate``."""
        gates, start = [], 0
        for block in range(self.segment.depth):
            parts: list[Tensor | None] = []
            for units, gated in (
                (self.segment.heads[block], self.segment.gated_heads[block]),
                (self.segment.groups[block], self.segment.gated_groups[block]),
            ):
                taken = len(units) if gated and width_gate is not None else 0
                parts.append(width_gate[start : start + taken] if taken and width_gate is not None else None)
                start += taken
            gates.append(Gates(*parts))
        return gates

    def unpatchify(self, hidden: Tensor, conditioning: Tensor) -> Tensor:
        """Final layer: (B, N, C) -> (B, C_out, H, W)."""
        shift, scale = self.final_modulation(conditioning).unsqueeze(1).chunk(2, dim=2)  # (B, 1, C)
        patches = self.final(modulated_norm(hidden, shift, scale).flatten(0, 1))  # (B * N, P * P * C_out)
        patches = patches.view(-1, self.grid, self.grid, self.patch_size, self.patch_size, self.out_channels)
        pixels = patches.permute(0, 5, 1, 3, 2, 4)  # (B, C_out, grid, P, grid, P)
        side = self.grid * self.patch_size
        return pixels.reshape(-1, self.out_channels, side, side)


def modulated_norm(hidden: Tensor, shift: Tensor, scale: Tensor, eps: float = NORM_EPS) -> Tensor:
    """adaLN: LayerNorm(x) * (1 + scale) + shift, for (B, N, C) and (B, 1, C)."""
    return F.layer_norm(hidden, hidden.shape[-1:], eps=eps) * (1 + scale) + shift
