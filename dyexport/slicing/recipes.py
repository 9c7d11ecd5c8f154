"""Recipes that make a slim network's tensors from dense ones.

A recipe names the tensors to read and the units to keep. Nothing is read until ``materialize``, so graphs of
networks larger than memory can be planned and exported first, and their weights streamed later. Tensors that
shrink with width are made unit by unit: the first n units of a longer tensor are a contiguous run of its bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from dyexport.bundle.spec import Quantization

CODES: Mapping[Quantization, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
QMAX: Mapping[Quantization, float] = {"int8": 127.0, "fp8": 448.0}  # symmetric: -128 is not used

Read = Callable[[str], Tensor]
"""Returns a dense tensor, given its name in the stock state dict."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One tensor of a slim network, by ``kind``:

    ``copy``     the unchanged dense tensor
    ``rows``     (out, in) or (out,) -> rows of the kept units
    ``columns``  (out, in) -> columns of the kept units, stored transposed (kept, out)
    ``qkv``      query, key and value rows interleaved head by head: (H', 3, head_dim, in) flattened to 2-D
    ``norm``     (head_dim,), the weight of a query's or a key's norm

    ``span`` is the range of rows or columns that the units divide; None: all. ``scale`` multiplies rows, the query or
    the norm, so that attention need not multiply by head_dim ** -0.5. ``halves`` puts the even channels of a query's
    or key's head before the odd ones.

    With ``quantization`` the tensor is stored as eight-bit codes. With ``scales`` in addition it holds their scales in
    ``dtype``, one per output channel. A scale is taken over all inputs, kept or not, so that networks share codes.
    """

    kind: Literal["copy", "rows", "columns", "qkv", "norm"]
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    units: tuple[int, ...] = ()
    unit_size: int = 1
    span: tuple[int, int] | None = None
    scale: float = 1.0
    halves: bool = False
    quantization: Quantization | None = None
    scales: bool = False

    @property
    def stored_dtype(self) -> torch.dtype:
        return self.dtype if self.quantization is None or self.scales else CODES[self.quantization]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.stored_dtype.itemsize

    @property
    def family(self) -> tuple[object, ...]:
        """Recipes of one family differ only in the units they keep."""
        tail = self.shape if self.kind == "copy" else self.shape[1:]
        made = (self.kind, self.unit_size, self.span, self.scale, self.halves, tail)
        return (self.sources, made, self.dtype, self.quantization, self.scales)


def materialize(recipe: Recipe, read: Read) -> Tensor:
    """Make the tensor, contiguous, of ``recipe.shape`` and ``recipe.stored_dtype``."""
    dense = [read(name) for name in recipe.sources]
    if recipe.scale != 1.0 or recipe.quantization is not None:
        dense = [tensor.float() for tensor in dense]  # half precision is rounded once, at the end
    if recipe.scales:
        return _scales(recipe, dense).contiguous()
    made = _MAKERS[recipe.kind](recipe, dense)
    if recipe.quantization is None:
        return made.reshape(recipe.shape).to(recipe.dtype).contiguous()
    scales = _scales(recipe, dense).float().unsqueeze(0 if recipe.kind == "columns" else 1)
    return quantize(made.reshape(recipe.shape) / scales, recipe.quantization).contiguous()


def quantize(scaled: Tensor, quantization: Quantization) -> Tensor:
    """Round values, divided by their scale, to the nearest codes, ties to even; saturate at the largest code."""
    largest = QMAX[quantization]
    nearest = scaled.round() if quantization == "int8" else scaled
    return nearest.clamp(-largest, largest).to(CODES[quantization])


def scale_of(largest: Tensor, quantization: Quantization, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the scale at which the largest code is ``largest``: positive even for zeros, and normal in ``dtype``."""
    return (largest / QMAX[quantization]).clamp(min=torch.finfo(dtype).tiny).to(dtype)


def _scales(recipe: Recipe, dense: list[Tensor]) -> Tensor:
    """Compute the scales of output channels, rounded to ``dtype`` as the network reads them: (out,)."""
    assert recipe.quantization is not None
    if recipe.kind == "columns":
        start, end = recipe.span or (0, dense[0].shape[1])
        largest = dense[0][:, start:end].abs().amax(1)  # (out,)
    else:
        largest = _MAKERS[recipe.kind](recipe, [weight.abs().amax(1) for weight in dense]).flatten()
    return scale_of(largest, recipe.quantization, recipe.dtype)


def _rows(recipe: Recipe, dense: list[Tensor]) -> Tensor:
    start, end = recipe.span or (0, dense[0].shape[0])
    kept = dense[0][start:end].unflatten(0, (-1, recipe.unit_size))[list(recipe.units)]
    if recipe.halves:
        kept = _halves(kept, 1)
    return kept if recipe.scale == 1.0 else kept * recipe.scale


def _columns(recipe: Recipe, dense: list[Tensor]) -> Tensor:
    start, end = recipe.span or (0, dense[0].shape[1])
    return dense[0][:, start:end].T.unflatten(0, (-1, recipe.unit_size))[list(recipe.units)]


def _qkv(recipe: Recipe, dense: list[Tensor]) -> Tensor:
    query, key, value = (tensor.unflatten(0, (-1, recipe.unit_size))[list(recipe.units)] for tensor in dense)
    if recipe.halves:
        query, key = _halves(query, 1), _halves(key, 1)
    return torch.stack([query * recipe.scale, key, value], dim=1)


def _norm(recipe: Recipe, dense: list[Tensor]) -> Tensor:
    return (_halves(dense[0], 0) if recipe.halves else dense[0]) * recipe.scale


def _halves(tensor: Tensor, axis: int) -> Tensor:
    size = tensor.shape[axis]
    return tensor.index_select(axis, torch.cat([torch.arange(0, size, 2), torch.arange(1, size, 2)]))


_MAKERS: Mapping[str, Callable[[Recipe, list[Tensor]], Tensor]] = {
    "copy": lambda recipe, dense: dense[0],
    "rows": _rows,
    "columns": _columns,
    "qkv": _qkv,
    "norm": _norm,
}
