"""Inputs and outputs at fixed addresses, which runs of a captured CUDA graph read and write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dyexport.engines.base import Tensors, shape_key

if TYPE_CHECKING:
    import torch

SHAPES = 8  # sets of input shapes that an engine captures; ONNX Runtime frees a graph with its session only


@dataclass(frozen=True, kw_only=True)
class Buffers:
    """Tensors for one set of input shapes, bound to a session, and the number of the graph that uses them."""

    graph: int
    binding: Any
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]

    def fill(self, inputs: Tensors) -> None:
        for name, tensor in self.inputs.items():
            tensor.copy_(inputs[name], non_blocking=True)

    def copies(self) -> dict[str, torch.Tensor]:
        """Return the outputs as tensors that the next run does not overwrite."""
        return {name: tensor.clone() for name, tensor in self.outputs.items()}


class BuffersByShape:
    """Buffers of up to ``limit`` sets of input shapes, made when a set of shapes is run for the second time.

    ``bind(inputs, outputs)`` binds tensors to a session. Shapes that are run once are not worth a capture.
    """

    def __init__(self, bind: Callable[[Tensors, Tensors], Any], limit: int = SHAPES) -> None:
        self._bind = bind
        self._limit = limit
        self._seen: set[Any] = set()
        self._buffers: dict[Any, Buffers] = {}

    def __len__(self) -> int:
        return len(self._buffers)

    def find(self, inputs: Tensors, outputs: Callable[[], dict[str, torch.Tensor]]) -> Buffers | None:
        """Return the buffers for the shapes of ``inputs``; None for a run that is not captured.

        New buffers start as copies of ``inputs``, and ``outputs()`` allocates their outputs.
        """
        key = shape_key(inputs)
        if key in self._buffers:
            return self._buffers[key]
        if len(self._buffers) >= self._limit:
            return None
        if key not in self._seen:
            self._seen.add(key)
            return None
        held, made = {name: tensor.clone() for name, tensor in inputs.items()}, outputs()
        self._buffers[key] = Buffers(
            graph=len(self._buffers) + 1, binding=self._bind(held, made), inputs=held, outputs=made
        )
        return self._buffers[key]
