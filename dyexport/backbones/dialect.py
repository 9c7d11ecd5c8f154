"""Contract of ``published``: names of weights in files of other code than diffusers. Imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from dyexport.backbones.base import Preset

if TYPE_CHECKING:
    from torch import Tensor


class Part(NamedTuple):
    """Rows of a tensor in a file, by default all: from ``start / of`` to ``stop / of`` of them."""

    name: str
    start: int = 0
    stop: int = 1
    of: int = 1


class Dialect(ABC):
    """Names under which other code than diffusers stores a backbone's weights."""

    description: ClassVar[str]
    """Name of that code, for messages."""

    numerics: Mapping[str, Any] = MappingProxyType({})
    """Configuration entries that make diffusers compute the same as that code."""

    @abstractmethod
    def matches(self, names: Collection[str]) -> bool:
        """Return whether a file has these names."""

    @abstractmethod
    def structure(self, weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return the diffusers configuration that follows from shapes; None where they do not determine it."""

    @abstractmethod
    def places(self, target: Collection[str], preset: Preset) -> dict[str, tuple[Part, ...]]:
        """Return the parts of a file that make up each tensor of ``target``, joined along the rows."""
