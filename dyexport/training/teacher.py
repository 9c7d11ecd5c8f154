"""The distillation target once the gates have settled: a frozen copy of the dense model's averaged weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dyexport.backbones.base import Inputs
from dyexport.models.dynamic import DynamicTransformer


class Teacher:
    """The dense model under frozen ``weights``, named as in the model."""

    def __init__(self, model: DynamicTransformer, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights
        self._dense = _Dense(model)

    @torch.no_grad()
    def predict(self, inputs: Inputs) -> Tensor:
        """Return the model's ``forward_dense`` under the frozen weights: (B, ...)."""
        # Tied weights would be swapped once for each block that shares the embedder, and the last swap not undone.
        weights = {f"model.{name}": value for name, value in self.weights.items()}
        prediction: Tensor = functional_call(self._dense, weights, (inputs,), tie_weights=False)
        return prediction


class _Dense(nn.Module):
    """``forward_dense`` as the forward of a module, which ``functional_call`` needs."""

    def __init__(self, model: DynamicTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Inputs) -> Tensor:
        return self.model.forward_dense(inputs)
