"""Hooks that gate a stock module, and permutations of its units."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

BIAS = ".bias"  # suffix of the parameters that ``LoraSpec.bias`` trains


def on_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Pass a module's first positional input through ``change``."""
    module.register_forward_pre_hook(partial(_change_input, change))


def on_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Pass a module's output through ``change``."""
    module.register_forward_hook(partial(_change_output, change))


def watch_input(module: nn.Module, watch: Callable[[Tensor], None]) -> None:
    """Call ``watch`` with a module's first positional input."""
    module.register_forward_pre_hook(partial(_watch_input, watch))


# Partials of functions, not closures: a copied model's hooks must act on the copy.
def _change_input(change: Callable[[Tensor], Tensor], module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (change(inputs[0]), *inputs[1:])


def _change_output(change: Callable[[Tensor], Tensor], module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return change(output)


def _watch_input(watch: Callable[[Tensor], None], module: nn.Module, inputs: tuple[Any, ...]) -> None:
    watch(inputs[0])


def unit_channels(units: Tensor, size: int) -> Tensor:
    """Return the channel indices of contiguous units of ``size`` channels: (U,) -> (U * size,)."""
    return (units[:, None] * size + torch.arange(size)).flatten()


def permute_outputs(linear: nn.Linear, channels: Tensor) -> None:
    """Reorder a Linear's outputs in place."""
    linear.weight.copy_(linear.weight[channels])
    if linear.bias is not None:
        linear.bias.copy_(linear.bias[channels])


def permute_inputs(linear: nn.Linear, channels: Tensor) -> None:
    """Reorder a Linear's inputs in place."""
    linear.weight.copy_(linear.weight[:, channels])
