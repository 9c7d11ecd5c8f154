"""How the inputs and outputs of a network are described, on both sides of a bundle."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Name, dtype (``float32``, ``int64``, ...) and shape of a binding.

    A symbol is a dimension free at run time; ``2*height`` is one that is always even.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
