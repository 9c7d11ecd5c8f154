"""Least-squares repair of a network whose widths are cut without training. Not in the paper.

Removing heads and MLP groups takes their part out of the sums that output projections compute. Most of it is
predictable from the units that stay, so the projections are fitted again, as in channel pruning (arXiv 1707.06168,
section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import ceil
from typing import Any, cast

import torch
from torch import Tensor, nn

from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.inputs import NoisedInputs
from dyexport.progress import Progress, no_progress

RIDGE = 1e-3  # of the mean squared input, added to the diagonal of the normal equations

Change = Callable[[str, Tensor, Tensor], None]
"""Takes the name of a linear, and what to add to its weight (out, in) and its bias (out,)."""


@torch.no_grad()
def fit_projections(
    model: DynamicTransformer,
    names: Sequence[str],
    inputs: NoisedInputs,
    timesteps: Sequence[float],
    change: Change,
    *,
    rows_per_input: int = 4,
    progress: Progress = no_progress,
) -> None:
    """Fit the linears that read gated units, ``names`` in the backbone, so that the masked model is near the dense one.

    Each gets the weight and bias that bring its outputs in the masked model nearest to those in the dense model, over
    ``inputs`` at all timesteps together: one weight serves every t. Layers are fitted in order of execution, in one
    pass, so that each corrects what the layers before it left. There are at least ``rows_per_input`` tokens for each
    input of the widest linear. The model itself does not change; a streamed one is fitted too.
    """
    widest = max(cast(nn.Linear, model.backbone.get_submodule(name)).in_features for name in names)
    repeats = ceil(rows_per_input * widest / (inputs.rows * len(timesteps)))
    larger = replace(inputs, batch_size=inputs.batch_size * repeats)
    twice = larger.over((*timesteps, *timesteps), device=model.device)  # the same samples at the same t
    masks = []
    for gates in model.width_gates(twice["timestep"]):  # (2 B, L, U)
        dense, masked = gates.chunk(2)
        masks.append(torch.cat([torch.ones_like(dense), masked]))
    with _fitting(model.backbone, names, change, progress):
        model.forward_masked(twice, heads=masks[0], groups=masks[1])


@contextmanager
def _fitting(backbone: nn.Module, names: Sequence[str], change: Change, progress: Progress) -> Iterator[None]:
    """Fit each linear when it runs: the first half of a batch is the dense model's, the second the masked model's."""
    fitted: set[str] = set()

    def fit(name: str, linear: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        dense, masked = output.chunk(2)
        rows = arguments[0].chunk(2)[1]
        weight, bias = least_squares(rows.flatten(0, -2), (dense - masked).flatten(0, -2))
        change(name, weight, bias)
        fitted.add(name)
        progress(len(fitted), len(names))
        return torch.cat([dense, masked + (rows.float() @ weight.T + bias).to(masked.dtype)])

    handles = []
    for name in names:
        hook = lambda *parts, name=name: fit(name, *parts)  # noqa: E731
        handles.append(backbone.get_submodule(name).register_forward_hook(hook))
    progress(0, len(names))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def least_squares(rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Fit ``rows @ weight.T + bias`` (R, in) to ``targets`` (R, out) by ridge regression: (out, in), (out,) in fp32.

    Inputs that are always zero, such as those of a unit that is never on, get weights of zero.
    """
    rows, targets = rows.float(), targets.float()
    center, offset = rows.mean(dim=0), targets.mean(dim=0)  # (in,), (out,)
    centered = rows - center
    gram = (centered.T @ centered).double()  # (in, in)
    products = (centered.T @ (targets - offset)).double()  # (in, out)
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, products).T.float()  # (out, in)
    return weight, offset - weight @ center
