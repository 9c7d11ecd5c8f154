"""Where training latents come from. Sources are indexed: which samples a step sees is a function of the step alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dyexport.errors import DataError, MissingDependency
from dyexport.presets import Preset

Split = Literal["train", "held-out"]
HELD_OUT_SHARE = 0.2


class Batch(NamedTuple):
    latents: Tensor  # (B, C, H, W) float32
    labels: Tensor  # (B,) int64


class LatentSource(Protocol):
    """Latents and labels by index; ``name`` identifies the data between runs."""

    name: str

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> Batch:
        """The samples at (B,) indices."""


def open_source(spec: str, preset: Preset) -> LatentSource:
    """``digits``, or a directory of safetensors files with keys ``latents`` and ``labels``.

    Synthetic data is such a directory too (``dyexport.training.synthetic``). Raises ``DataError``.
    """
    if spec != "digits":
        return ShardDirectory(Path(spec), preset)
    if (preset.in_channels, preset.sample_size) != (1, 8):
        raise DataError(
            f"digits are (1, 8, 8) and {preset.name} takes {_latent_shape(preset)}; use {preset.backbone}-digits"
        )
    return digits()


class MemorySource:
    """Latents (n, C, H, W) and labels (n,) held in memory."""

    def __init__(self, name: str, latents: Tensor, labels: Tensor) -> None:
        self.name = name
        self.latents = latents
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> Batch:
        return Batch(self.latents[indices], self.labels[indices])


def digits(split: Split = "train") -> MemorySource:
    """scikit-learn's 1,797 handwritten digits, scaled to [-1, 1], in a fixed 80/20 split: (n, 1, 8, 8)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependency("scikit-learn", "demo") from error
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    held_out = round(HELD_OUT_SHARE * len(order))
    rows = order[:held_out] if split == "held-out" else order[held_out:]
    latents = torch.from_numpy(data.images[rows]).float()[:, None] / 8 - 1  # (n, 1, 8, 8)
    return MemorySource(f"digits/{split}", latents, torch.from_numpy(data.target[rows]).long())


class ShardDirectory:
    """A directory of safetensors shards, memory-mapped; only the rows asked for are read.

    Each shard holds ``latents`` (n, C, H, W), any float type, and ``labels`` (n,), any integer type.
    Shapes and labels are checked when opened, finiteness when read; raises ``DataError`` naming the file.
    """

    def __init__(self, directory: Path, preset: Preset) -> None:
        paths = sorted(directory.glob("*.safetensors"))
        if not paths:
            raise DataError(
                f"{directory} holds no .safetensors files; give a directory of latents, or 'digits' or 'synthetic'"
            )
        self.shards = [_Shard(path, preset) for path in paths]
        self.starts = torch.tensor([0, *(len(shard.labels) for shard in self.shards)]).cumsum(0)  # (S + 1,)
        self.name = " ".join(f"{shard.path.name}:{shard.path.stat().st_size}" for shard in self.shards)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def batch(self, indices: Tensor) -> Batch:
        shards = torch.bucketize(indices, self.starts, right=True) - 1  # (B,)
        offsets = indices - self.starts[shards]  # (B,)
        rows = [self.shards[s].row(i) for s, i in zip(shards.tolist(), offsets.tolist(), strict=True)]
        return Batch(torch.cat([row.latents for row in rows]), torch.cat([row.labels for row in rows]))


class _Shard:
    """One open file of a ``ShardDirectory``."""

    def __init__(self, path: Path, preset: Preset) -> None:
        self.path = path
        try:
            file: Any = safe_open(path, framework="pt")
            self.latents = file.get_slice("latents")
            self.labels = file.get_tensor("labels")  # (n,)
        except (OSError, SafetensorError) as error:
            raise DataError(f"cannot read {path}: {error}; a shard holds the tensors 'latents' and 'labels'") from error
        self._check(preset)

    def _check(self, preset: Preset) -> None:
        shape, wanted = tuple(self.latents.get_shape()), _latent_shape(preset)
        if shape[1:] != wanted:
            raise DataError(f"{self.path}: latents are {shape}; {preset.name} takes (n, {', '.join(map(str, wanted))})")
        if self.labels.shape != shape[:1] or self.labels.is_floating_point():
            raise DataError(
                f"{self.path}: labels are {self.labels.dtype} {tuple(self.labels.shape)}; give ({shape[0]},) integers"
            )
        outside = self.labels[(self.labels < 0) | (self.labels >= preset.classes)]
        if len(outside):
            raise DataError(
                f"{self.path}: label {int(outside[0])} is outside [0, {preset.classes}), the classes of {preset.name}"
            )

    def row(self, index: int) -> Batch:
        latents = self.latents[index : index + 1].float()  # (1, C, H, W)
        if not latents.isfinite().all():
            raise DataError(f"{self.path}: latents[{index}] holds NaN or infinity; remove that sample")
        return Batch(latents, self.labels[index : index + 1].long())


def _latent_shape(preset: Preset) -> tuple[int, int, int]:
    return preset.in_channels, preset.sample_size, preset.sample_size
