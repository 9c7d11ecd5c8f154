"""The engine contract. Implementations are in this folder, one file per backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dyexport.bundle.tensors import TensorSpec
from dyexport.errors import EngineMismatchError

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, "torch.Tensor"]


@dataclass(frozen=True, kw_only=True)
class EngineIO:
    """Inputs and outputs of an engine."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def check(self, inputs: Tensors) -> dict[str, int]:
        """Return the size of every symbol in ``inputs``.

        Raises ``EngineMismatchError`` unless names, dtypes and shapes match; a symbol has one size wherever it occurs.
        """
        expected = {spec.name for spec in self.inputs}
        if expected != set(inputs):
            raise EngineMismatchError(f"engine takes {sorted(expected)}, got {sorted(inputs)}")
        symbols: dict[str, int] = {}
        for spec in self.inputs:
            _check_tensor(spec, inputs[spec.name], symbols)
        return symbols

    def output_shapes(self, symbols: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the outputs, so that they can be allocated before a run."""
        sizes = {
            spec.name: [symbols.get(size) if isinstance(size, str) else size for size in spec.shape]
            for spec in self.outputs
        }
        for spec in self.outputs:
            if None in sizes[spec.name]:
                raise EngineMismatchError(
                    f"output {spec.name} has shape {list(spec.shape)}, which the inputs do not determine"
                )
        return {name: tuple(size for size in shape if size is not None) for name, shape in sizes.items()}


def shape_key(inputs: Tensors) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return a key that is equal for inputs of the same names and shapes."""
    return tuple(sorted((name, tuple(tensor.shape)) for name, tensor in inputs.items()))


def _check_tensor(spec: TensorSpec, tensor: torch.Tensor, symbols: dict[str, int]) -> None:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype != spec.dtype:
        raise EngineMismatchError(f"{spec.name} must be {spec.dtype}, is {dtype}")
    fits = len(spec.shape) == tensor.ndim and all(
        size == (symbols.setdefault(want, size) if isinstance(want, str) else want)
        for want, size in zip(spec.shape, tensor.shape, strict=True)
    )
    if not fits:
        raise EngineMismatchError(f"{spec.name} must have shape {list(spec.shape)}, has {list(tensor.shape)}")


@dataclass(frozen=True, kw_only=True)
class WeightSpan:
    """A range of bytes in a file that an engine reads weights from."""

    path: Path
    offset: int
    length: int


class Engine(ABC):
    """One executable network.

    Made cheaply; nothing touches a device or reads weights before ``activate``. ``run`` activates on
    first use, and after ``park`` or ``close`` a later ``run`` activates again.
    """

    @property
    @abstractmethod
    def io(self) -> EngineIO:
        """Bindings; may be read before ``activate``."""

    @property
    @abstractmethod
    def weights(self) -> tuple[WeightSpan, ...]:
        """Ranges of files that hold the weights; may be read before ``activate``."""

    @property
    @abstractmethod
    def shares_weights(self) -> bool:
        """True if weights are used in place, in the mapped file, so that engines over one file hold them once."""

    @property
    @abstractmethod
    def active(self) -> bool:
        """True while weights and workspace are in memory."""

    @abstractmethod
    def activate(self) -> None:
        """Load the weights and prepare to run. Idempotent."""

    @abstractmethod
    def run(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        """Execute once. Raises ``EngineMismatchError`` for inputs that do not fit ``io``."""

    def park(self) -> None:
        """Free the weights, to make room for another engine; ``active`` is then False.

        A backend may keep what speeds up the next ``activate``, until ``close``. Idempotent.
        """
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Free everything ``activate`` took. Idempotent."""

    def __enter__(self) -> Engine:
        self.activate()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
