"""The diffusers class that a bundle stands in for: its module, example inputs, and equality of types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dyexport.backbones import get_stand_in
from dyexport.bundle.spec import ModelSpec


def example_inputs(spec: ModelSpec, batch: int, t: float, seed: int = 0) -> dict[str, torch.Tensor]:
    """Make noise and random conditions as the stock module's arguments: the same tensors for the same arguments."""
    return get_stand_in(spec.backbone).example_inputs(spec, batch, t, seed)


def stock_class(spec: ModelSpec) -> Any:
    """Return the diffusers class of a bundle's model."""
    stock = get_stand_in(spec.backbone).stock
    assert stock is not None, "a backbone's class names it"
    return stock


def stock_transformer(spec: ModelSpec) -> torch.nn.Module:
    """Make diffusers' own module at the bundle's size, with random weights, on which no timing depends."""
    module: torch.nn.Module = stock_class(spec)(**spec.config).eval()
    return module


def random_rows(batch: int, seed: int) -> Callable[..., torch.Tensor]:
    """Return a function that makes normal noise (batch, *shape): the same tensors for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(batch, *shape, generator=generator)


class EqualsStock(type):
    """Metaclass of stand-ins, each of which is equal to the diffusers class that it stands in for.

    A subclass is not enough: ``from_pipe`` of a pipeline keeps a component only if its type is equal to the annotated
    one. Hashes differ, so that tables keyed by class hold both.
    """

    stock: type[torch.nn.Module] | None

    def __eq__(cls, other: object) -> bool:
        return cls is other or (cls.stock is not None and cls.stock is other)

    __hash__ = type.__hash__
