"""What teaches the dynamic path once its gates have settled: the complete model, as it was until then."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dyexport.backbones.base import Inputs
from dyexport.models.dynamic import DynamicTransformer


class Teacher:
    """The complete model under frozen weights; ``weights`` are the trained ones, by their names in the model."""

    def __init__(self, model: DynamicTransformer, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights
        self._complete = _Complete(model)

    @torch.no_grad()
    def predict(self, inputs: Inputs) -> Tensor:
        """What the model's ``complete`` was when the weights were its own."""
        # Tying would swap the embedder once for each block that shares it, and leave the last swap behind.
        weights = {f"model.{name}": value for name, value in self.weights.items()}
        prediction: Tensor = functional_call(self._complete, weights, (inputs,), tie_weights=False)
        return prediction


class _Complete(nn.Module):
    """``complete`` as a forward pass, which is what can be called with other weights."""

    def __init__(self, model: DynamicTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Inputs) -> Tensor:
        return self.model.forward_dense(inputs)
