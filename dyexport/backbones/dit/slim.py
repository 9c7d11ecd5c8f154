"""The slim DiT: a static network from which a segment's unused heads and MLP channels are gone.

It comes in two parts. What depends on t and the label only, a third of DiT's weights, is the conditioning
network; it runs once for all steps of a trajectory. The rest runs at each step, with query, key and value
in one product. The dense network is the same module with every unit kept, so the two are compared at
equal effort.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyexport.bundle.manifest import Segment
from dyexport.bundle.plan_info import LARGEST_TOPK
from dyexport.lora import LoraSpec
from dyexport.slicing.slim_layers import (
    Gates,
    Selection,
    TransposedLinear,
    embed_sinusoid,
    gate_units,
    gated_update,
    modulated_norm,
    run_selected,
    scales_from_one,
    select_tokens,
)
from dyexport.slicing.slim_lora import GateRouters, WithPaths, lora_paths, with_experts

BLOCK_PARTS = 6  # shift, scale and gate, of attention and of the MLP
FINAL_PARTS = 2  # shift and scale of the final layer


def modulation_parts(depth: int) -> int:
    """Vectors of C channels that condition one sample at one t."""
    return BLOCK_PARTS * depth + FINAL_PARTS


class DiTConditioning(nn.Module):
    """Every adaLN parameter of a DiT from t and the label: all blocks', then the final layer's."""

    def __init__(self, config: Mapping[str, Any], *, td_lora: LoraSpec | None) -> None:
        super().__init__()
        channels = config["num_attention_heads"] * config["attention_head_dim"]
        self.frequencies = nn.Parameter(torch.empty(128))
        self.time_in = nn.Linear(256, channels)
        self.time_out = nn.Linear(channels, channels)
        self.labels = nn.Embedding(config["num_embeds_ada_norm"] + 1, channels)
        self.blocks = nn.ModuleList(nn.Linear(channels, BLOCK_PARTS * channels) for _ in range(config["num_layers"]))
        self.final = nn.Linear(channels, FINAL_PARTS * channels)
        self.experts = GateRouters(channels, config["num_layers"], td_lora.experts) if td_lora else None

    def forward(self, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """t (R,), labels (R,) -> (R, (6 L + 2) C), scales with their 1 added, then gates of L * E experts."""
        sinusoid = embed_sinusoid(timestep, self.frequencies).to(self.time_in.weight.dtype)  # (R, 256)
        time = self.time_out(F.silu(self.time_in(sinusoid)))  # (R, C)
        embedding = F.silu(time + self.labels(class_labels))  # (R, C)
        parts = [part for block in self.blocks for part in scales_from_one(block(embedding), BLOCK_PARTS)]
        parts += scales_from_one(self.final(embedding), FINAL_PARTS)
        return torch.cat(parts if self.experts is None else [*parts, self.experts(time)], dim=1)


class SlimBlock(WithPaths):
    """What adaLN-Zero blocks of DiT and Latte are made of, at the widths and on the token path of their segment."""

    def __init__(
        self, config: Mapping[str, Any], segment: Segment, index: int, *, group_size: int, td_lora: LoraSpec | None
    ) -> None:
        super().__init__()
        head_dim = config["attention_head_dim"]
        channels = config["num_attention_heads"] * head_dim
        self.heads = len(segment.heads[index])
        self.head_dim = head_dim
        self.mlp_eps = config["norm_eps"]
        self.path = segment.token_paths[index]
        self.capacity = segment.capacities[index]
        self.by_score = segment.room(index) <= LARGEST_TOPK
        self.qkv = nn.Linear(channels, 3 * self.heads * head_dim)
        self.out = TransposedLinear(self.heads * head_dim, channels)
        self.fc1 = nn.Linear(channels, len(segment.groups[index]) * group_size)
        self.fc2 = TransposedLinear(len(segment.groups[index]) * group_size, channels)
        self.add_paths(td_lora, "out", "fc1", "fc2", qkv=(self.heads, head_dim))
        if self.path != "all":
            hidden = max(channels // 16, 1)
            self.router_in = nn.Linear(channels, hidden)
            self.router_out = nn.Linear(hidden, 1)

    def feed(
        self, hidden: Tensor, modulation: tuple[Tensor, ...], gates: Gates, slots: int
    ) -> tuple[Tensor, Tensor | None]:
        """The MLP: (B, N, C), 3 x (B, 1, C) -> (B, N, C), and the tokens wanted (B,) where room for them is limited."""
        shift, scale, gate = modulation
        selection = self.select(hidden, slots)
        normed = modulated_norm(hidden, shift, scale, self.mlp_eps).flatten(0, 1)  # (B * N, C)
        update = run_selected(selection, lambda rows: self.feed_forward(rows, gates), normed)  # (B * N, C)
        return gated_update(hidden, gate, update.view(hidden.shape)), selection.kept

    def select(self, hidden: Tensor, slots: int) -> Selection:
        """The tokens whose MLP runs, by the router on the residual (B, N, C)."""
        if self.path == "all":
            return Selection()
        scores = self.router_out(F.relu(self.router_in(hidden.flatten(0, 1).float()))).view(hidden.shape[:2])  # (B, N)
        room = self.capacity + (slots if self.path == "dynamic" else 0)
        return select_tokens(self.path, scores, room, by_score=self.by_score)

    def attend(self, normed: Tensor, gates: Gates) -> Tensor:
        """Self-attention of the kept heads: (B, N, C) -> (B, N, C)."""
        batch, tokens, channels = normed.shape
        qkv = self.linear("qkv", normed.flatten(0, 1), gates)  # (B * N, H' * 3 * D)
        qkv = qkv.view(batch, tokens, self.heads, 3, self.head_dim).permute(3, 0, 2, 1, 4)  # (3, B, H', N, D)
        query, key, value = qkv.unbind(0)  # (B, H', N, D)
        mixed = F.scaled_dot_product_attention(query, key, value, scale=1.0)  # (B, H', N, D), scaled by query weights
        if gates.heads is not None:
            mixed = mixed * gates.heads.view(1, -1, 1, 1).to(mixed.dtype)
        mixed = mixed.transpose(1, 2).reshape(batch * tokens, self.heads * self.head_dim)  # (B * N, H' * D)
        return self.linear("out", mixed, gates).view(batch, tokens, channels)

    def feed_forward(self, rows: Tensor, gates: Gates) -> Tensor:
        """The kept MLP groups on normed tokens: (R, C) -> (R, C)."""
        wide = F.gelu(self.linear("fc1", rows, gates), approximate="tanh")  # (R, G' * S)
        # Gates after GELU: for 0 and 1 it is the same, and cheaper.
        return self.linear("fc2", gate_units(wide, gates.groups), gates)


class DiTBlock(SlimBlock):
    """Attention, then the MLP."""

    def forward(
        self, hidden: Tensor, modulation: tuple[Tensor, ...], gates: Gates, slots: int
    ) -> tuple[Tensor, Tensor | None]:
        """(B, N, C), 6 x (B, 1, C) -> (B, N, C), and the tokens wanted (B,) where room for them is limited."""
        shift, scale, gate = modulation[:3]
        normed = modulated_norm(hidden, shift, scale)  # (B, N, C)
        hidden = gated_update(hidden, gate, self.attend(normed, gates))  # (B, N, C)
        return self.feed(hidden, modulation[3:], gates, slots)


class SlimDiT(nn.Module):
    """A DiT at the widths of one segment, without its conditioning network."""

    def __init__(
        self, config: Mapping[str, Any], segment: Segment, *, group_size: int, td_lora: LoraSpec | None
    ) -> None:
        super().__init__()
        self.segment, self.td_lora = segment, td_lora
        channels = config["num_attention_heads"] * config["attention_head_dim"]
        self.patch_size = config["patch_size"]
        self.grid = config["sample_size"] // self.patch_size
        self.out_channels = config["out_channels"]
        self.patch = nn.Conv2d(config["in_channels"], channels, self.patch_size, stride=self.patch_size)
        self.position = nn.Parameter(torch.empty(1, self.grid**2, channels))
        paths = lora_paths(td_lora, segment)
        self.blocks = nn.ModuleList(
            DiTBlock(config, segment, index, group_size=group_size, td_lora=paths) for index in range(segment.depth)
        )
        self.final = nn.Linear(channels, self.patch_size**2 * self.out_channels)

    def forward(
        self,
        hidden_states: Tensor,
        modulation: Tensor,
        width_gate: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Latents (B, C_in, H, W), modulation (B, M), gates (W,), slots (S,) -> sample (B, C_out, H, W), kept (B, R).

        ``kept`` is what the R token routers whose room is limited wanted; absent where there is none.
        """
        hidden = self.patch(hidden_states).flatten(2).transpose(1, 2) + self.position  # (B, N, C)
        hidden = hidden.to(self.final.weight.dtype)
        vectors = modulation_parts(self.segment.depth) * hidden.shape[2]
        parts = modulation[:, :vectors].unsqueeze(1).split(hidden.shape[2], dim=2)  # (6 L + 2) x (B, 1, C)
        extra = 0 if slots is None else slots.shape[0]
        counts = []
        for index, gates in enumerate(with_experts(self.segment, width_gate, modulation, self.td_lora)):
            own = parts[BLOCK_PARTS * index : BLOCK_PARTS * (index + 1)]
            hidden, kept = self.blocks[index](hidden, own, gates, extra)
            if kept is not None:
                counts.append(kept)
        sample = self.unpatchify(modulated_norm(hidden, *parts[-FINAL_PARTS:]))  # (B, C_out, H, W)
        return (sample, torch.stack(counts, dim=1)) if counts else (sample,)

    def unpatchify(self, normed: Tensor) -> Tensor:
        """Final layer: (B, N, C) -> (B, C_out, H, W)."""
        patches = self.final(normed.flatten(0, 1)).float()  # (B * N, P * P * C_out)
        patches = patches.view(-1, self.grid, self.grid, self.patch_size, self.patch_size, self.out_channels)
        pixels = patches.permute(0, 5, 1, 3, 2, 4)  # (B, C_out, grid, P, grid, P)
        side = self.grid * self.patch_size
        return pixels.reshape(-1, self.out_channels, side, side)
