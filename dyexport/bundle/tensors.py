"""Description of the inputs and outputs of a network."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """The name, dtype (``float32``, ``int64``, ...) and shape of a binding.

    A string in ``shape`` names a dynamic dimension; ``2*height`` is one that is always even.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
