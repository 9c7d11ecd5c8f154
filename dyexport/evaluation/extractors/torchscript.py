"""TorchScript files as feature extractors and classifiers. Loading one executes its code.

A network takes pictures (B, 3, H, W) in fp32 with values in [0, 1], at the size of the samples. One whose ``forward``
has an argument ``return_features``, as NVIDIA's Inception-v3 for FID has, takes values from 0 to 255 in uint8.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dyexport.errors import CheckpointError, reason
from dyexport.evaluation.extractors.base import in_color, whole

WITH_FEATURES = "return_features"


class TorchScriptNetwork:
    """A network from a TorchScript file. Raises ``CheckpointError`` if it cannot be read or run."""

    def __init__(self, source: str) -> None:
        self.name = Path(source).name
        try:
            self._module: Any = torch.jit.load(source, map_location="cpu").eval()
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"cannot read {source} as TorchScript: {reason(error)}; save it with torch.jit.save, or give a "
                "directory of transformers"
            ) from error
        arguments = [argument.name for argument in self._module.forward.schema.arguments]
        self._bytes = WITH_FEATURES in arguments

    @torch.inference_mode()
    def run(self, pictures: torch.Tensor, *, features: bool) -> torch.Tensor:
        """Return the features, or the scores of classes, of pictures (B, C, H, W)."""
        inputs = in_color(pictures)  # (B, 3, H, W)
        inputs = (inputs * 255).round().to(torch.uint8) if self._bytes else inputs.float()
        options = {WITH_FEATURES: True} if features and self._bytes else {}
        try:
            output: torch.Tensor = self._module.to(pictures.device)(inputs, **options)
        except RuntimeError as error:
            shape = list(inputs.shape)
            raise CheckpointError(f"{self.name} does not take pictures of shape {shape}: {_cause(error)}") from error
        if not isinstance(output, torch.Tensor):
            raise CheckpointError(
                f"{self.name} returns a {type(output).__name__}; script a network that returns one tensor"
            )
        return whole(output, self.name)


def _cause(error: Exception) -> str:
    """Return the last line of TorchScript's traceback."""
    return str(error).strip().splitlines()[-1].strip()


class TorchScriptFeatures(TorchScriptNetwork):
    """Features by a TorchScript file: its output (B, d)."""

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.run(pictures, features=True)  # (B, d)


class TorchScriptClassifier(TorchScriptNetwork):
    """Classes by a TorchScript file: the largest of its outputs (B, classes)."""

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.run(pictures, features=False).argmax(dim=1)  # (B,)
