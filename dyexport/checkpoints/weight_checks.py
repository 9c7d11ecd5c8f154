"""Checks of a checkpoint's weights against a model: names, shapes, dtypes and finite values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dyexport.checkpoints.weight_files import listed, weight_files
from dyexport.digests import once, sha256_of
from dyexport.errors import CheckpointError
from dyexport.progress import Progress

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_weights(
    weights: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    source: Path,
    model: str,
    advance: Progress | None = None,
) -> None:
    """Check that weights have the names and shapes of ``expected``, a known dtype and finite values.

    ``expected`` may be on the meta device. ``advance`` is called with the number of tensors read and their total,
    since reading a large model takes minutes. Raises ``CheckpointError``.
    """
    for name, target in expected.items():
        if name in weights and weights[name].shape != target.shape:
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(weights[name].shape)}, {model} needs {tuple(target.shape)}; "
                "choose the --model this checkpoint was made for"
            )
    if missing := [name for name in expected if name not in weights]:
        raise CheckpointError(f"{source} lacks {listed(missing)}; it is not a checkpoint of {model}")
    if unknown := [name for name in weights if name not in expected]:
        raise CheckpointError(f"{source} holds {listed(unknown)}, which {model} does not have; choose another --model")

    def check_values() -> None:
        for done, (name, tensor) in enumerate(weights.items()):
            _check_values(f"{source}: {name}", tensor)
            if advance is not None:
                advance(done + 1, len(weights))

    files = [source] if source.is_file() else weight_files(source)
    once(f"finite {' '.join(map(sha256_of, files))}", check_values)


def _check_values(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise CheckpointError(f"{name} is stored as {tensor.dtype}; pass weights in fp32, bf16 or fp16")
    extremes = tensor.aminmax() if tensor.numel() else ()  # in one pass, without a copy
    if not all(extreme.isfinite() for extreme in extremes):
        raise CheckpointError(f"{name} holds NaN or infinity; the checkpoint is broken")
    if not all(extreme.float().isfinite() for extreme in extremes):
        raise CheckpointError(f"{name} holds values beyond fp32, which models run in; the checkpoint is broken")
