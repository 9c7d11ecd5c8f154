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
    """Rows of a tensor in a file: those from ``start`` to ``stop`` where all of them are ``of``; by default all."""

    name: str
    start: int = 0
    stop: int = 1
    of: int = 1


class Dialect(ABC):
    """Names under which other code than diffusers stores a backbone's weights."""

    description: ClassVar[str]
    """Whose names they are, for messages."""

    numerics: Mapping[str, Any] = MappingProxyType({})
    """Configuration entries of what that code computes differently."""

    @abstractmethod
    def matches(self, names: Collection[str]) -> bool:
        """Return whether a file has these names."""

    @abstractmethod
    def structure(self, weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return the diffusers configuration that shapes tell; None where they do not tell enough."""

    @abstractmethod
    def places(self, target: Collection[str], preset: Preset) -> dict[str, tuple[Part, ...]]:
        """Return the parts of a file, joined along the rows, of which each tensor of ``target`` consists."""
