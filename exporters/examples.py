"""Example inputs that a slim module is traced with, and their dynamic sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dyexport.slicing.slicer import Slice


def example_sizes(slice_: Slice) -> dict[str, int]:
    """Return a distinct size for every symbol. None is 0 or 1, which the exporter would specialize."""
    symbols = dict.fromkeys(size for spec in slice_.inputs for size in spec.shape if isinstance(size, str))
    plain = {
        symbol: max(slice_.limits.get(symbol, 0), slice_.floors.get(symbol, 0) + 2 + index)
        for index, symbol in enumerate(symbols)
    }
    largest = max(plain.values(), default=0)
    return {
        symbol: factor * (largest + size) if (factor := _factor(symbol)) > 1 else size for symbol, size in plain.items()
    }


def _factor(symbol: str) -> int:
    """Return the factor of a symbol's sizes: 2 for ``2*height``."""
    factor, star, _ = symbol.partition("*")
    return int(factor) if star else 1


def example_inputs(slice_: Slice, sizes: Mapping[str, int], device: str = "meta") -> dict[str, Tensor]:
    """Return zeros for every input, by name; on the meta device they have no values."""
    shapes = {s.name: [sizes[size] if isinstance(size, str) else size for size in s.shape] for s in slice_.inputs}
    return {s.name: torch.zeros(shapes[s.name], dtype=getattr(torch, s.dtype), device=device) for s in slice_.inputs}


def dynamic_shapes(slice_: Slice) -> dict[str, dict[int, Any]]:
    """Return the dynamic dimensions of every input for ``torch.export``; equal symbols share one ``Dim``."""
    symbols = dict.fromkeys(size for spec in slice_.inputs for size in spec.shape if isinstance(size, str))
    dims = {symbol: _dimension(symbol, slice_) for symbol in symbols}
    return {
        spec.name: {axis: dims[size] for axis, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in slice_.inputs
    }


def _dimension(symbol: str, slice_: Slice) -> Any:
    floor, limit = slice_.floors.get(symbol), slice_.limits.get(symbol)
    dimension = torch.export.Dim(symbol.rpartition("*")[2], min=floor, max=limit)
    return dimension if (factor := _factor(symbol)) == 1 else factor * dimension
