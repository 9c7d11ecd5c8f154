"""How much each head and MLP group matters to the output, and putting the most important first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from dyexport.backbones.base import Inputs
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.inputs import NoisedInputs, Progress, no_progress

PROBES = 4
KEPT = 2**26  # elements of all blocks' outputs in a pass, for each of which going back needs some 100 bytes: 7 GB


def unit_importance(
    model: DynamicTransformer,
    inputs: NoisedInputs,
    timesteps: Sequence[float],
    probes: int = PROBES,
    progress: Progress = no_progress,
) -> tuple[np.ndarray, np.ndarray]:
    """Squared output change per unit, to first order: heads (T, L, H) and groups (T, L, G).

    The importance of unit u is ||d f / d m_u||^2, m_u being its mask at 1: what the output loses, to
    first order, when the unit goes. It is estimated with random output probes v, as
    E[(d (v . f) / d m_u)^2]; masks are per sample, so one backward pass serves a whole batch.
    """
    rows = min(len(timesteps), inputs.per_pass) * inputs.rows
    with _recomputing(model, enabled=rows * model.depth * inputs.preset.hidden_size > KEPT):
        chunks = inputs.chunks(timesteps, progress)
        heads, groups = zip(*(_at(model, inputs, chunk, probes) for chunk in chunks), strict=True)
    return torch.cat(heads).numpy(), torch.cat(groups).numpy()


@contextmanager
def _recomputing(model: DynamicTransformer, *, enabled: bool) -> Iterator[None]:
    """Inside, a backward pass computes block by block anew, instead of keeping all that it needs."""
    backbone = cast(Any, model.backbone)
    if not enabled or backbone.is_gradient_checkpointing:  # as a streamed backbone always is
        yield
        return
    backbone.enable_gradient_checkpointing()
    try:
        yield
    finally:
        backbone.disable_gradient_checkpointing()


def _at(
    model: DynamicTransformer, inputs: NoisedInputs, timesteps: Sequence[float], probes: int
) -> tuple[Tensor, Tensor]:
    """(T, L, H), (T, L, G)"""
    totals = [torch.zeros(len(timesteps), model.depth, units) for units in (model.heads, model.groups)]
    for draw in range(probes):
        gradients = _probe(model, inputs.over(timesteps, draw, model.device), draw)
        for total, gradient in zip(totals, gradients, strict=True):
            total += gradient.square().unflatten(0, (len(timesteps), -1)).mean(dim=1) / probes
    return totals[0], totals[1]


def _probe(model: DynamicTransformer, inputs: Inputs, seed: int) -> tuple[Tensor, Tensor]:
    """Gradients of one random projection of the output: (B, L, H), (B, L, G)."""
    batch, channels = inputs["hidden_states"].shape[:2]
    heads = torch.ones(batch, model.depth, model.heads, device=model.device, requires_grad=True)
    groups = torch.ones(batch, model.depth, model.groups, device=model.device, requires_grad=True)
    with torch.enable_grad(), model.gated(heads=heads, groups=groups):  # going back may recompute
        sample = model.forward_dense(inputs)[:, :channels]  # without a learned sigma
        probe = torch.randn(sample.shape, generator=torch.Generator().manual_seed(seed)).to(model.device)
        gradients = torch.autograd.grad(sample, (heads, groups), probe)
    return gradients[0].cpu(), gradients[1].cpu()


def rank_units(
    model: DynamicTransformer, inputs: NoisedInputs, timesteps: Sequence[float], progress: Progress = no_progress
) -> None:
    """Reorder the units of every block, most important first, so that the unit forced on is the best one.

    The function computed by the complete model does not change. Routers, which refer to units by
    position, must not have been trained yet.
    """
    scores = zip(("heads", "groups"), unit_importance(model, inputs, timesteps, progress=progress), strict=True)
    order = {name: torch.from_numpy(np.argsort(-found.mean(axis=0), kind="stable").copy()) for name, found in scores}
    for block in range(model.depth):
        model.adapter.permute_units(model.backbone, block, order["heads"][block], order["groups"][block])
    model.order = order
