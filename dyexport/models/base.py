"""What dyexport must know of a backbone to make it dynamic; one adapter per architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dyexport.errors import UsageError
from dyexport.models.gates import BlockGates, TokenRouter

BIAS = ".bias"  # ends the names of what is trained beside TD-LoRA, where that is asked for

Inputs = Mapping[str, Tensor]
"""Arguments of one forward pass, by the names of the stock module: ``hidden_states``, ``timestep``, and so on."""


class BackboneAdapter(Protocol):
    """Everything architecture-specific on the build side, as functions of a stock diffusers module."""

    stock: type[nn.Module]
    """The diffusers class; its arguments are the entries of a checkpoint's configuration."""

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """A stock module of that configuration, shared embedders shared, with torch's default initialisation."""

    def initialise(self, backbone: Any) -> None:
        """Overwrite the weights with the published initialisation for training from scratch."""

    def share_embedders(self, backbone: Any) -> None:
        """Make what blocks share in the architecture one module; raises ``CheckpointError`` where copies differ."""

    def run(self, backbone: Any, inputs: Inputs) -> Tensor:
        """The stock module's output, shaped as its latents or with more channels: (B, ...)."""

    def blocks(self, backbone: Any) -> list[nn.Module]:
        """Every block that has gates, in order of execution."""

    def token_router(self, channels: int) -> TokenRouter:
        """A new token router of one block, with torch's default initialisation."""

    def attach(self, block: Any, gates: BlockGates) -> None:
        """Hook a block's gates into the stock block; each multiplies, so that slicing there is exact."""

    def lora_targets(self, block: Any) -> tuple[str, ...]:
        """The linears of a block's attention and MLP, by their names in it: what TD-LoRA updates."""

    def timestep_embedding(self, backbone: Any, timestep: Tensor) -> Tensor:
        """What width routers see, a function of t alone: (B,) -> (B, C)."""

    def permute_units(self, backbone: Any, block: int, heads: Tensor, groups: Tensor) -> None:
        """Reorder heads (H,) and MLP groups (G,) of a block in place; the function computed is unchanged."""


_ADAPTERS = {
    "dit": "dyexport.models.dit:DiTAdapter",
    "sit": "dyexport.models.dit:DiTAdapter",
    "flux": "dyexport.models.flux:FluxAdapter",
    "latte": "dyexport.models.latte:LatteAdapter",
}


def get_adapter(backbone: str) -> BackboneAdapter:
    """The adapter for a backbone kind; ``sit`` shares DiT's network and differs only in its objective."""
    if backbone not in _ADAPTERS:
        raise UsageError(f"unknown backbone {backbone!r}; known: {', '.join(_ADAPTERS)}")
    module, _, name = _ADAPTERS[backbone].partition(":")
    adapter: BackboneAdapter = getattr(import_module(module), name)()
    return adapter


def on_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Pass a module's first positional input through ``change``."""
    module.register_forward_pre_hook(partial(_change_input, change))


def on_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Pass a module's output through ``change``."""
    module.register_forward_hook(partial(_change_output, change))


def watch_input(module: nn.Module, watch: Callable[[Tensor], None]) -> None:
    """Show a module's first positional input to ``watch``."""
    module.register_forward_pre_hook(partial(_watch_input, watch))


# Partials of functions, not closures: a copied model's hooks must act on the copy.
def _change_input(change: Callable[[Tensor], Tensor], module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (change(inputs[0]), *inputs[1:])


def _change_output(change: Callable[[Tensor], Tensor], module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return change(output)


def _watch_input(watch: Callable[[Tensor], None], module: nn.Module, inputs: tuple[Any, ...]) -> None:
    watch(inputs[0])


def unit_channels(units: Tensor, size: int) -> Tensor:
    """Channel indices of contiguous units of ``size`` channels each: (U,) -> (U * size,)."""
    return (units[:, None] * size + torch.arange(size)).flatten()


def permute_outputs(linear: nn.Linear, channels: Tensor) -> None:
    """Reorder a Linear's outputs in place."""
    linear.weight.copy_(linear.weight[channels])
    if linear.bias is not None:
        linear.bias.copy_(linear.bias[channels])


def permute_inputs(linear: nn.Linear, channels: Tensor) -> None:
    """Reorder a Linear's inputs in place."""
    linear.weight.copy_(linear.weight[:, channels])
