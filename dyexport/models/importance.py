"""Importance of every head and MLP group to the output, and reordering units by it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from dyexport.backbones.base import Inputs, Preset
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.inputs import NoisedInputs
from dyexport.progress import Progress, no_progress

PROBES = 4
KEPT = 2**26  # block output elements per pass: 7 GB
BYTES = 100  # that a backward pass keeps for each of them, unless blocks are recomputed
BLOCKS = 60  # what one keeps while it is recomputed, with gradients, in inputs of blocks


def unit_importance(
    model: DynamicTransformer,
    inputs: NoisedInputs,
    timesteps: Sequence[float],
    probes: int = PROBES,
    progress: Progress = no_progress,
) -> tuple[np.ndarray, np.ndarray]:
    """Estimate the squared output change per unit, to first order: heads (T, L, H), groups (T, L, G).

    The importance of unit u is ||d f / d m_u||^2 at mask m_u = 1: the change of the output, to first order, when
    the unit is removed. It is estimated with random output probes v as E[(d (v . f) / d m_u)^2]. Masks are per
    sample, so one backward pass serves a whole batch.
    """
    passes = importance_by_pass(model, inputs, timesteps, probes, progress)
    heads, groups = zip(*passes, strict=True)
    return torch.cat(heads).numpy(), torch.cat(groups).numpy()


def importance_by_pass(
    model: DynamicTransformer,
    inputs: NoisedInputs,
    timesteps: Sequence[float],
    probes: int = PROBES,
    progress: Progress = no_progress,
    done: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the importance at the timesteps of one pass after the other: heads (T', L, H), groups (T', L, G).

    The first ``done`` timesteps, those of whole passes, are left out.
    """
    rows = min(len(timesteps), inputs.per_pass) * inputs.rows
    with _recomputing(model, enabled=rows * model.depth * inputs.preset.hidden_size > KEPT):
        for chunk in inputs.chunks(timesteps[done:], lambda now, _: progress(done + now, len(timesteps))):
            yield _at(model, inputs, chunk, probes)


def memory_of_pass(preset: Preset, rows: int) -> int:
    """Estimate the bytes of activations in a forward and backward pass of ``rows`` tokens, recomputed or not."""
    elements = rows * preset.hidden_size
    kept = BYTES * elements * preset.depth if elements * preset.depth <= KEPT else 0
    return max(kept, torch.float32.itemsize * elements * (preset.depth + BLOCKS))


@contextmanager
def _recomputing(model: DynamicTransformer, *, enabled: bool) -> Iterator[None]:
    """Turn gradient checkpointing on inside the context: a backward pass recomputes activations block by block.

    A streamed backbone always does so, but by itself does not reopen the gates of TD-LoRA.
    """
    backbone = cast(Any, model.backbone)
    streamed = backbone.is_gradient_checkpointing
    if enabled or streamed:
        model.checkpoint_blocks()
    try:
        yield
    finally:
        if enabled and not streamed:
            backbone.disable_gradient_checkpointing()


def _at(
    model: DynamicTransformer, inputs: NoisedInputs, timesteps: Sequence[float], probes: int
) -> tuple[Tensor, Tensor]:
    """Estimate importance at each timestep: (T, L, H), (T, L, G)."""
    totals = [torch.zeros(len(timesteps), model.depth, units) for units in (model.heads, model.groups)]
    for probe in range(probes):
        gradients = _probe(model, inputs.over(timesteps, probe, model.device), probe)
        for total, gradient in zip(totals, gradients, strict=True):
            total += gradient.square().unflatten(0, (len(timesteps), -1)).mean(dim=1) / probes
    return totals[0], totals[1]


def _probe(model: DynamicTransformer, inputs: Inputs, seed: int) -> tuple[Tensor, Tensor]:
    """Compute gradients of one random projection of the output: (B, L, H), (B, L, G)."""
    batch, channels = inputs["hidden_states"].shape[:2]
    heads = torch.ones(batch, model.depth, model.heads, device=model.device, requires_grad=True)
    groups = torch.ones(batch, model.depth, model.groups, device=model.device, requires_grad=True)
    with torch.enable_grad(), model.gated(heads=heads, groups=groups):  # backward may recompute
        sample = model.forward_dense(inputs)[:, :channels]  # without a learned sigma
        probe = torch.randn(sample.shape, generator=torch.Generator().manual_seed(seed)).to(model.device)
        gradients = torch.autograd.grad(sample, (heads, groups), probe)
    return gradients[0].cpu(), gradients[1].cpu()


def order_of(heads: np.ndarray, groups: np.ndarray) -> dict[str, Tensor]:
    """Return the units by importance, most important first, from importance (T, L, H) and (T, L, G).

    The order has ``heads`` (L, H) and ``groups`` (L, G): the place of every unit before ranking.
    """
    scores = {"heads": heads, "groups": groups}
    return {
        name: torch.from_numpy(np.argsort(-value.mean(axis=0), kind="stable").copy()) for name, value in scores.items()
    }
