"""The slim FLUX: double blocks (image and text side by side), then single blocks (both in one row of tokens).

As for DiT, everything that depends on sigma, guidance and the pooled text alone is the conditioning network:
a quarter of FLUX's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyexport.backbones.flux.slim_conditioning import FINAL_PARTS, SINGLE_PARTS, STREAM_PARTS, channels_of
from dyexport.backbones.flux.slim_layers import FeedForward, Projection, Rotary, RouterInput, attend
from dyexport.bundle.manifest import Segment
from dyexport.bundle.plan_info import LARGEST_TOPK
from dyexport.lora import LoraSpec
from dyexport.slicing.slim_layers import (
    Gates,
    Selection,
    TransposedLinear,
    gate_units,
    gated_update,
    modulated_norm,
    run_selected,
    select_tokens,
)
from dyexport.slicing.slim_lora import WithPaths, gates_size, lora_paths, with_experts


class DoubleBlock(WithPaths):
    """Joint attention, then an FFN of its own for image and text; image tokens may skip theirs."""

    def __init__(
        self, config: Mapping[str, Any], segment: Segment, index: int, *, group_size: int, td_lora: LoraSpec | None
    ) -> None:
        super().__init__()
        channels, head_dim = channels_of(config), config["attention_head_dim"]
        heads, wide = len(segment.heads[index]), len(segment.groups[index]) * group_size
        self.path, self.capacity = segment.token_paths[index], segment.capacities[index]
        self.by_score = segment.room(index) <= LARGEST_TOPK
        self.image = Projection(channels, heads, head_dim, td_lora)
        self.text = Projection(channels, heads, head_dim, td_lora)
        self.image_out = TransposedLinear(heads * head_dim, channels)
        self.text_out = TransposedLinear(heads * head_dim, channels)
        self.image_mlp = FeedForward(channels, wide, td_lora)
        self.text_mlp = FeedForward(channels, wide, td_lora)
        self.add_paths(td_lora, "image_out", "text_out")

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        parts: tuple[Tensor, ...],
        router: RouterInput | None,
        rotary: Rotary,
        gates: Gates,
        slots: int,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(B, N, C), (B, T, C), 12 x (B, 1, C) -> both streams, and the tokens wanted (B,) where room is limited."""
        of_image, of_text = parts[:STREAM_PARTS], parts[STREAM_PARTS:]
        mixed_image, mixed_text = self.mix(image, text, of_image, of_text, rotary, gates)
        image = gated_update(image, of_image[2], self.project("image_out", mixed_image, gates))  # (B, N, C)
        text = gated_update(text, of_text[2], self.project("text_out", mixed_text, gates))  # (B, T, C)
        selection = Selection()
        if self.path != "all" and router is not None:
            room = self.capacity + (slots if self.path == "dynamic" else 0)
            selection = select_tokens(self.path, router.scores(image, text), room, by_score=self.by_score)
        image_update = self.feed(self.image_mlp, image, of_image, gates, selection)  # (B, N, C)
        text_update = self.feed(self.text_mlp, text, of_text, gates, Selection())  # (B, T, C)
        image, text = gated_update(image, of_image[5], image_update), gated_update(text, of_text[5], text_update)
        return image, text, selection.kept

    def mix(
        self,
        image: Tensor,
        text: Tensor,
        of_image: tuple[Tensor, ...],
        of_text: tuple[Tensor, ...],
        rotary: Rotary,
        gates: Gates,
    ) -> tuple[Tensor, Tensor]:
        """Joint attention, text before image: (B, N, H' * D), (B, T, H' * D)."""
        from_image = self.image(modulated_norm(image, of_image[0], of_image[1]), gates)
        from_text = self.text(modulated_norm(text, of_text[0], of_text[1]), gates)
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(from_text, from_image, strict=True))
        mixed = attend(query, key, value, rotary, gates.heads)  # (B, T + N, H' * D)
        return mixed[:, text.shape[1] :], mixed[:, : text.shape[1]]

    def project(self, out: str, mixed: Tensor, gates: Gates) -> Tensor:
        """(B, N, H' * D) -> (B, N, C)."""
        return self.linear(out, mixed.flatten(0, 1), gates).view(*mixed.shape[:2], -1)

    @staticmethod
    def feed(mlp: FeedForward, stream: Tensor, parts: tuple[Tensor, ...], gates: Gates, selection: Selection) -> Tensor:
        """The FFN's update of one stream: (B, N, C) -> (B, N, C)."""
        normed = modulated_norm(stream, parts[3], parts[4]).flatten(0, 1)  # (B * N, C)
        return run_selected(selection, lambda rows: mlp(rows, gates), normed).view(stream.shape)


class SingleBlock(WithPaths):
    """Attention and MLP side by side with one output projection; a skipped image token misses both updates."""

    def __init__(
        self,
        config: Mapping[str, Any],
        segment: Segment,
        index: int,
        *,
        group_size: int,
        td_lora: LoraSpec | None,
        text_tokens: int,
    ) -> None:
        super().__init__()
        channels, head_dim = channels_of(config), config["attention_head_dim"]
        heads, wide = len(segment.heads[index]), len(segment.groups[index]) * group_size
        self.path, self.capacity = segment.token_paths[index], segment.capacities[index]
        self.by_score = text_tokens + segment.room(index) <= LARGEST_TOPK
        self.projection = Projection(channels, heads, head_dim, td_lora)
        self.fc1 = nn.Linear(channels, wide)
        self.out = nn.Parameter(torch.empty(heads * head_dim, channels))
        self.fc2 = TransposedLinear(wide, channels)
        self.add_paths(td_lora, "fc1", "out", "fc2")

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        parts: tuple[Tensor, ...],
        router: RouterInput | None,
        rotary: Rotary,
        gates: Gates,
        slots: int,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(B, N, C), (B, T, C), 3 x (B, 1, C) -> both, and the tokens wanted (B,) where room for them is limited."""
        shift, scale, gate = parts
        tokens = torch.cat([text, image], dim=1)  # (B, T + N, C)
        normed = modulated_norm(tokens, shift, scale)  # (B, T + N, C)
        query, key, value = self.projection(normed, gates)  # (B, H', T + N, D)
        mixed = attend(query, key, value, rotary, gates.heads)  # (B, T + N, H' * D)
        selection, kept = Selection(), None
        if self.path != "all" and router is not None:
            selection, kept = self.select(router.scores(image, text), text.shape[1], slots)

        def branch(rows: Tensor, attention: Tensor) -> Tensor:
            wide = gate_units(F.gelu(self.linear("fc1", rows, gates), approximate="tanh"), gates.groups)
            update = torch.addmm(self.linear("fc2", wide, gates), attention, self.out)  # (R, C)
            return self.updated(update, "out", attention, gates)

        update = run_selected(selection, branch, normed.flatten(0, 1), mixed.flatten(0, 1))  # (B * (T + N), C)
        tokens = gated_update(tokens, gate, update.view(tokens.shape))
        return tokens[:, text.shape[1] :], tokens[:, : text.shape[1]], kept

    def select(self, scores: Tensor, text: int, slots: int) -> tuple[Selection, Tensor | None]:
        """Every text token, and image tokens by their scores (B, N); the image tokens wanted (B,)."""
        always = scores.abs().amax(1, keepdim=True).expand(-1, text) + 1  # on, and ahead of every image token
        room = text + self.capacity + (slots if self.path == "dynamic" else 0)
        selection = select_tokens(self.path, torch.cat([always, scores], dim=1), room, by_score=self.by_score)
        return selection, None if selection.kept is None else selection.kept - text


class SlimFlux(nn.Module):
    """A FLUX at the widths of one segment, without its conditioning network."""

    def __init__(
        self,
        config: Mapping[str, Any],
        segment: Segment,
        *,
        group_size: int,
        token_routers: bool,
        td_lora: LoraSpec | None,
        text_tokens: int,
    ) -> None:
        super().__init__()
        self.segment, self.token_routers, self.td_lora = segment, token_routers, td_lora
        self.doubles, self.channels = config["num_layers"], channels_of(config)
        self.axes = tuple(size // 2 for size in config["axes_dims_rope"])
        self.image_in = nn.Linear(config["in_channels"], self.channels)
        self.text_in = nn.Linear(config["joint_attention_dim"], self.channels)
        self.rotary = nn.Parameter(torch.empty(config["attention_head_dim"] // 2))
        single = partial(SingleBlock, text_tokens=text_tokens)
        kinds: list[Callable[..., nn.Module]] = [DoubleBlock] * self.doubles + [single] * config["num_single_layers"]
        paths = lora_paths(td_lora, segment)
        self.blocks = nn.ModuleList(
            kind(config, segment, index, group_size=group_size, td_lora=paths) for index, kind in enumerate(kinds)
        )
        self.final = nn.Linear(self.channels, config.get("out_channels") or config["in_channels"])

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        modulation: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        width_gate: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Latents (B, N, C_in), text (B, T, J), modulation (B, M), positions (N, 3), (T, 3), gates (W,), slots (S,).

        Returns sample (B, N, C_out) and, where R token routers have limited room, what they wanted (B, R).
        """
        dtype = self.image_in.weight.dtype
        image, text = self.image_in(hidden_states.to(dtype)), self.text_in(encoder_hidden_states.to(dtype))  # (B, ., C)
        rotary = self.angles(torch.cat([txt_ids, img_ids]))
        parts, routers = self.split_modulation(modulation)
        extra = 0 if slots is None else slots.shape[0]
        counts = []
        for index, gates in enumerate(with_experts(self.segment, width_gate, modulation, self.td_lora)):
            image, text, kept = self.blocks[index](image, text, parts[index], routers[index], rotary, gates, extra)
            if kept is not None:
                counts.append(kept)
        shift, scale = parts[-1]
        sample = self.final(modulated_norm(image, shift, scale)).float()  # (B, N, C_out)
        return (sample, torch.stack(counts, dim=1)) if counts else (sample,)

    def split_modulation(self, modulation: Tensor) -> tuple[list[tuple[Tensor, ...]], list[RouterInput | None]]:
        """Vectors (B, 1, C) of every block, and at the end of the final layer; token routers of every block."""
        depth = self.segment.depth
        modulation = modulation[:, : modulation.shape[1] - gates_size(self.td_lora, depth)]
        constants = depth if self.token_routers else 0
        vectors = modulation[:, : modulation.shape[1] - constants].unsqueeze(1).split(self.channels, dim=2)
        sizes = [2 * STREAM_PARTS] * self.doubles + [SINGLE_PARTS] * (depth - self.doubles)
        parts, start = [], 0
        for size in sizes:
            parts.append(vectors[start : start + size])
            start += size
        routers: list[RouterInput | None] = [None] * depth
        if self.token_routers:
            offsets = modulation[:, modulation.shape[1] - depth :].split(1, dim=1)  # L x (B, 1)
            routers = [
                RouterInput(vectors[start + 2 * index], vectors[start + 2 * index + 1], offsets[index])
                for index in range(depth)
            ]
        return [*parts, vectors[-FINAL_PARTS:]], routers

    def angles(self, ids: Tensor) -> Rotary:
        """Positions (S, 3) -> angles: the channels of a head are split among the three axes."""
        parts = zip(ids.unsqueeze(2).unbind(1), self.rotary.split(self.axes), strict=True)
        angles = torch.cat([position * frequencies for position, frequencies in parts], dim=1)  # (S, D / 2)
        return Rotary(angles.cos(), angles.sin())
