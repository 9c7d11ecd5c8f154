"""Engines that refuse to run once the files of their bundle have changed since it was opened."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from dyexport.bundle.reader import Bundle
from dyexport.engines.base import Engine, EngineIO, Tensors, WeightSpan
from dyexport.errors import BundleError

if TYPE_CHECKING:
    import torch


class HeldEngine(Engine):
    """An engine of a bundle, which raises ``BundleError`` if the bundle has changed since it was opened.

    All files of the bundle are checked around each activation. Files that weights may be mapped from are checked after
    each run as well.
    """

    def __init__(self, engine: Engine, bundle: Bundle) -> None:
        self._engine = engine
        self._bundle = bundle

    @cached_property
    def io(self) -> EngineIO:
        with self._bundle.unchanged():
            return self._engine.io

    @cached_property
    def weights(self) -> tuple[WeightSpan, ...]:
        with self._bundle.unchanged():
            return self._engine.weights

    @cached_property
    def _weight_files(self) -> frozenset[str]:
        return frozenset(span.path.relative_to(self._bundle.base).as_posix() for span in self.weights)

    @property
    def shares_weights(self) -> bool:
        return self._engine.shares_weights

    @property
    def active(self) -> bool:
        return self._engine.active

    def activate(self) -> None:
        if self._engine.active:
            return
        try:
            with self._bundle.unchanged():
                self._engine.activate()
        except BundleError:
            self._engine.close()
            raise

    def run(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        self.activate()
        outputs = self._engine.run(inputs)
        self._bundle.check_unchanged(self._weight_files)
        return outputs

    def park(self) -> None:
        self._engine.park()

    def close(self) -> None:
        self._engine.close()
