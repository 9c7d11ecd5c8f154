"""DiT, SiT and DyDiT as functions of a state dict in published naming: an independent account of what a file means."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dyexport.backbones.dit.preset import DiTPreset

State = dict[str, Tensor]


def random_state(preset: DiTPreset, *, routers: bool, seed: int = 0) -> State:
    """Random weights under published names; each width gate changes at a random t of its own."""
    generator = torch.Generator().manual_seed(seed)
    width, patch = preset.hidden_size, preset.patch_size
    outputs = patch**2 * preset.in_channels * (2 if preset.learn_sigma else 1)
    state = {
        "pos_embed": torch.randn(1, preset.tokens, width, generator=generator),
        "x_embedder.proj.weight": torch.randn(width, preset.in_channels, patch, patch, generator=generator),
        "x_embedder.proj.bias": torch.zeros(width),
        "y_embedder.embedding_table.weight": torch.randn(preset.classes + 1, width, generator=generator),
    }

    def linear(name: str, inputs: int, outputs: int) -> None:
        state[f"{name}.weight"] = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
        state[f"{name}.bias"] = torch.randn(outputs, generator=generator) * 0.1

    linear("t_embedder.mlp.0", 256, width)
    linear("t_embedder.mlp.2", width, width)
    for block in (f"blocks.{n}" for n in range(preset.depth)):
        linear(f"{block}.adaLN_modulation.1", width, 6 * width)
        linear(f"{block}.attn.qkv", width, 3 * width)
        linear(f"{block}.attn.proj", width, width)
        linear(f"{block}.mlp.fc1", width, 4 * width)
        linear(f"{block}.mlp.fc2", 4 * width, width)
        if routers:
            for router in (f"{block}.attn_rate.router", f"{block}.mlp_rate.router"):
                linear(router, width, preset.heads - 1)
                start, end = preset.timestep_range
                crossing = start + (end - start) * torch.rand(preset.heads - 1, generator=generator)
                state[f"{router}.bias"] = -(state[f"{router}.weight"] * _embed(state, crossing)).sum(dim=1)
            linear(f"{block}.token_selection.mlp_head.0", width, width // 16)
            linear(f"{block}.token_selection.mlp_head.2", width // 16, 1)
    linear("final_layer.adaLN_modulation.1", width, 2 * width)
    linear("final_layer.linear", width, outputs)
    return state


@torch.no_grad()
def denoise(
    state: State, preset: DiTPreset, *, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, routed: bool
) -> Tensor:
    """What the published model computes: (B, C, H, W), (B,), (B,) -> (B, C_out, H, W)."""
    tokens = F.conv2d(
        hidden_states, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=preset.patch_size
    )
    hidden = tokens.flatten(2).transpose(1, 2) + state["pos_embed"]  # (B, N, C)
    time = _embed(state, timestep)  # (B, C)
    conditioning = F.silu(time + state["y_embedder.embedding_table.weight"][class_labels])  # (B, C)
    for block in (f"blocks.{n}" for n in range(preset.depth)):
        shift1, scale1, gate1, shift2, scale2, gate2 = _modulation(
            state, f"{block}.adaLN_modulation.1", conditioning, 6
        )
        attended = _attend(state, block, _norm(hidden) * (1 + scale1) + shift1, time, preset.heads, routed)
        hidden = hidden + gate1 * attended  # (B, N, C)
        inner = _linear(state, f"{block}.mlp.fc1", _norm(hidden) * (1 + scale2) + shift2)  # (B, N, 4C)
        if routed:
            inner = inner * _mask(state, f"{block}.mlp_rate.router", time, inner.shape[-1] // preset.heads)
        update = gate2 * _linear(state, f"{block}.mlp.fc2", F.gelu(inner, approximate="tanh"))
        if routed:
            first = F.relu(_linear(state, f"{block}.token_selection.mlp_head.0", hidden))
            update = update * (_linear(state, f"{block}.token_selection.mlp_head.2", first) > 0)  # (B, N, C)
        hidden = hidden + update
    shift, scale = _modulation(state, "final_layer.adaLN_modulation.1", conditioning, 2)
    patches = _linear(state, "final_layer.linear", _norm(hidden) * (1 + scale) + shift)  # (B, N, P * P * C_out)
    grid, patch = preset.sample_size // preset.patch_size, preset.patch_size
    pixels = patches.view(len(patches), grid, grid, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return pixels.reshape(len(patches), -1, preset.sample_size, preset.sample_size)


def _embed(state: State, timestep: Tensor) -> Tensor:
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    angles = timestep[:, None] * frequencies  # (B, 128)
    sinusoid = torch.cat([angles.cos(), angles.sin()], dim=1)  # (B, 256)
    return _linear(state, "t_embedder.mlp.2", F.silu(_linear(state, "t_embedder.mlp.0", sinusoid)))


def _attend(state: State, block: str, normed: Tensor, time: Tensor, heads: int, routed: bool) -> Tensor:
    qkv = _linear(state, f"{block}.attn.qkv", normed).unflatten(-1, (3, heads, -1))  # (B, N, 3, H, D)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # 3 x (B, H, N, D)
    weights = (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5).softmax(dim=-1)  # (B, H, N, N)
    mixed = (weights @ value).transpose(1, 2).flatten(2)  # (B, N, C)
    if routed:
        mixed = mixed * _mask(state, f"{block}.attn_rate.router", time, mixed.shape[-1] // heads)
    return _linear(state, f"{block}.attn.proj", mixed)


def _mask(state: State, router: str, time: Tensor, size: int) -> Tensor:
    """Gates of all units, the first always on, each repeated over its channels: (B, 1, U * size)."""
    gates = F.pad((_linear(state, router, time) > 0).float(), (1, 0), value=1.0)
    return gates.repeat_interleave(size, dim=1)[:, None]


def _modulation(state: State, name: str, conditioning: Tensor, parts: int) -> tuple[Tensor, ...]:
    return _linear(state, name, conditioning)[:, None].chunk(parts, dim=2)


def _norm(hidden: Tensor) -> Tensor:
    return F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6)


def _linear(state: State, name: str, value: Tensor) -> Tensor:
    return F.linear(value, state[f"{name}.weight"], state[f"{name}.bias"])
