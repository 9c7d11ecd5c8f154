"""Dequantization of weights in eight bits or fewer, when they are read: fp8 of PyTorch and ComfyUI, and GGUF."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyexport.errors import CheckpointError, MissingDependencyError

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = (".scale_weight", ".weight_scale")  # suffixes of ComfyUI, one number per tensor: weight = codes * scale
UNUSED = (".scale_input", ".input_scale", "scaled_fp8")  # scales of activations, and the mark of such a file


class Dequantized(Mapping[str, Tensor]):
    """Weights with fp8 tensors read as bf16, multiplied by their scale where the file has one."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights
        self._names = [name for name in weights if not name.endswith((*SCALES, *UNUSED))]

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._weights[name]
        if tensor.dtype not in FP8:
            return tensor
        return (tensor.float() * self._scale(name)).to(torch.bfloat16)

    def _scale(self, name: str) -> Tensor:
        stem = name.removesuffix(".weight")
        scale = next(
            (self._weights[stem + end].float() for end in SCALES if stem + end in self._weights), torch.ones(())
        )
        if scale.numel() != 1:
            raise CheckpointError(
                f"{name} has {scale.numel()} scales, and fp8 is read with one scale for a tensor; save it in bf16"
            )
        return scale.reshape(())

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        yield from self._names

    def __len__(self) -> int:
        return len(self._names)


def dequantized(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the same weights, or dequantized ones if any is in fp8."""
    return Dequantized(weights) if any(tensor.dtype in FP8 for tensor in weights.values()) else weights


class GgufWeights(Mapping[str, Tensor]):
    """Tensors of a GGUF file by their names in it, in PyTorch's shapes, dequantized to fp32 by ``gguf``."""

    def __init__(self, file: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise MissingDependencyError("gguf", "gguf") from error
        try:
            self._tensors: dict[str, Any] = {tensor.name: tensor for tensor in GGUFReader(str(file)).tensors}
        except Exception as error:  # the reader raises what numpy and struct raise
            raise CheckpointError(f"{file} is damaged: {str(error)[:200]}; download it again") from error

    def __getitem__(self, name: str) -> Tensor:
        from gguf.quants import dequantize

        stored = self._tensors[name]
        values = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy())
        return values.reshape([int(size) for size in reversed(stored.shape)])

    def __iter__(self) -> Iterator[str]:
        yield from self._tensors

    def __len__(self) -> int:
        return len(self._tensors)
