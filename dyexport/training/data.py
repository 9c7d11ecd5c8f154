"""Sources of training latents, by index, so that the samples of a step depend on the step alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dyexport.backbones import get_conditioning
from dyexport.backbones.base import Preset
from dyexport.digests import once, sha256_of
from dyexport.digits import Split, load_digits
from dyexport.emoji import load_emoji
from dyexport.errors import DataError
from dyexport.models.conditions import GRID, Batch, Column
from dyexport.training.data_files import DIGITS, EMOJI, check_source, shard_files
from dyexport.training.data_record import SCALES, read_record, warn_of_scale

FLOATS, INTEGERS = ("F32", "F16", "BF16", "F64"), ("I64", "I32", "I16", "I8", "U8")  # as safetensors names them
Grid = tuple[int, int]  # rows and columns of tokens
ROWS = 256  # samples read at a time
SCALE_ROWS = 64  # samples whose standard deviation is taken


class LatentSource(Protocol):
    """Latents and their conditions by index."""

    @property
    def name(self) -> str:
        """Name that is the same for the same data in every run."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> Batch:
        """Return the samples at indices (B,)."""

    def check_finite(self) -> None:
        """Raise ``DataError`` for a value that is not finite."""


def open_source(spec: str, preset: Preset) -> LatentSource:
    """Open ``digits``, ``emoji``, or a directory of safetensors files with ``latents`` and conditions.

    Latents of unknown origin must have the scale that models are trained at; of encoded ones with another scale there
    is a warning. Raises ``DataError``.
    """
    check_source(spec, preset)
    if spec in BUILT_IN:
        return BUILT_IN[spec]("train")
    record = read_record(Path(spec))
    source = ShardDirectory(Path(spec), preset, {} if record is None else record.grids)
    if record is not None:
        warn_of_scale(record, Path(spec))
    elif not preset.pixel_space:
        source.check_scale()
    return source


class MemorySource:
    """Latents (n, C, H, W) and labels (n,) held in memory."""

    def __init__(self, name: str, latents: Tensor, labels: Tensor) -> None:
        self.name = name
        self.latents = latents
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> Batch:
        return Batch(self.latents[indices], {"class_labels": self.labels[indices]})

    def check_finite(self) -> None:
        if not self.latents.isfinite().all():
            raise DataError(f"{self.name} holds NaN or infinity; remove those samples")


def digits(split: Split = "train") -> MemorySource:
    """Return scikit-learn's handwritten digits, scaled to [-1, 1]: (n, 1, 8, 8)."""
    digits = load_digits(split)
    latents = torch.from_numpy(digits.pictures) * 2 - 1  # (n, 1, 8, 8)
    return MemorySource(f"digits/{split}", latents, torch.from_numpy(digits.labels))


def emoji(split: Split = "train") -> MemorySource:
    """Return emoji in color, scaled to [-1, 1]: (n, 3, 32, 32). Raises ``DataError``."""
    emoji = load_emoji(split)
    latents = torch.from_numpy(emoji.pictures) * 2 - 1  # (n, 3, 32, 32)
    return MemorySource(f"emoji/{split}", latents, torch.from_numpy(emoji.labels))


BUILT_IN: Mapping[str, Callable[[Split], MemorySource]] = {DIGITS: digits, EMOJI: emoji}
"""Data sets by the name that ``--data`` takes."""


def held_out(spec: str | None) -> MemorySource | None:
    """Return the part of a data set that is never trained on; None for data of the user, which has no such part."""
    return None if spec is None or spec not in BUILT_IN else BUILT_IN[spec]("held-out")


def _reason(path: Path, error: Exception) -> str:
    """Return why a file cannot be read: safetensors reports any such file as missing."""
    try:
        path.open("rb").close()
    except OSError as refused:
        return refused.strerror or str(refused)
    return str(error)


class ShardDirectory:
    """A directory of safetensors shards, memory-mapped: only the rows of a batch are read.

    Each shard holds ``latents`` (n, *latent_shape) of any float type and the columns of the model's conditioning, such
    as ``labels`` (n,). Those in ``grids``, by name, have other numbers of rows and columns of tokens than the model.
    Shapes and labels are checked when opened, finiteness when read. Raises ``DataError`` naming the file.
    """

    def __init__(self, directory: Path, preset: Preset, grids: Mapping[str, Grid] = MappingProxyType({})) -> None:
        conditions = get_conditioning(preset).columns
        self.shards = [
            _Shard(path, preset.name, (_latents_of(preset, grids.get(path.name)), *conditions), grids.get(path.name))
            for path in shard_files(directory)
        ]
        self.starts = torch.tensor([0, *(len(shard) for shard in self.shards)]).cumsum(0)  # (S + 1,)
        self._check_alike(conditions)

    @cached_property
    def name(self) -> str:
        """Names and hashes of the shards."""
        return " ".join(f"{shard.path.name}:{sha256_of(shard.path)}" for shard in self.shards)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def batch(self, indices: Tensor) -> Batch:
        shards = torch.bucketize(indices, self.starts, right=True) - 1  # (B,)
        offsets = indices - self.starts[shards]  # (B,)
        rows = [self.shards[s].row(i) for s, i in zip(shards.tolist(), offsets.tolist(), strict=True)]
        values = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        return Batch(values.pop("latents"), values)

    def random_rows(self, count: int, generator: torch.Generator) -> Tensor:
        """Return random indices (count,) of samples that can share a batch: those of one grid."""
        if len({shard.grid for shard in self.shards}) == 1:
            return torch.randint(len(self), (count,), generator=generator)
        first = torch.randint(len(self), (1,), generator=generator)
        grid = self.shards[int(torch.bucketize(first, self.starts, right=True)) - 1].grid
        rows = self._rows_of(grid)
        return rows[torch.randint(len(rows), (count,), generator=generator)]

    def own_rows(self) -> Tensor:
        """Return the indices (n,) of the samples that are of the model's own size."""
        return self._rows_of(None)

    def _rows_of(self, grid: Grid | None) -> Tensor:
        spans = zip(self.shards, self.starts.tolist(), strict=False)
        ranges = [torch.arange(start, start + len(shard)) for shard, start in spans if shard.grid == grid]
        return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.long)

    def check_finite(self) -> None:
        """Read everything, to find a value that is not finite before training. Raises ``DataError``."""
        for shard in self.shards:
            columns = " ".join(column.name for column in shard.columns)
            once(f"finite {sha256_of(shard.path)} {columns}", shard.check_finite)

    def check_scale(self) -> None:
        """Raise ``DataError`` for latents that were not scaled, or twice, by their standard deviation in some rows."""
        rows = torch.linspace(0, len(self) - 1, min(len(self), SCALE_ROWS)).long()
        std = float(self.batch(rows).latents.std())
        if not SCALES[0] <= std <= SCALES[1]:
            raise DataError(
                f"{self.shards[0].path.parent}: latents have a standard deviation of {std:.3g}, and models are trained "
                f"at about 1; apply the VAE's shift and scaling factor once, as `dyexport encode` does"
            )

    def _check_alike(self, columns: tuple[Column, ...]) -> None:
        """Raise ``DataError`` for shards whose rows cannot share a batch."""
        first = self.shards[0]
        for shard in self.shards[1:]:
            for name in (column.name for column in columns):
                if shard.shape(name)[1:] != first.shape(name)[1:]:
                    raise DataError(
                        f"{shard.path}: {name} are {shard.shape(name)} and in {first.path.name} {first.shape(name)}; "
                        "pad them to one length"
                    )


class _Shard:
    """One open file of a ``ShardDirectory``."""

    def __init__(self, path: Path, model: str, columns: tuple[Column, ...], grid: Grid | None = None) -> None:
        self.path = path
        self.grid = grid
        self.model = model
        self.columns = columns
        try:
            file: Any = safe_open(path, framework="pt")
            self.values = {column.name: file.get_slice(column.name) for column in columns}
        except (OSError, SafetensorError) as error:
            names = " and ".join(f"{column.name!r}" for column in columns)
            raise DataError(f"cannot read {path}: {_reason(path, error)}; a shard holds the tensors {names}") from error
        for column in columns:
            self._check(column)

    def __len__(self) -> int:
        return next(iter(self.shape("latents")), 0)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.values[name].get_shape())

    def _check(self, column: Column) -> None:
        shape, expected = self.shape(column.name), (len(self), *column.shape)
        if len(shape) != len(expected) or any(w not in (None, s) for s, w in zip(shape, expected, strict=True)):
            sizes = ", ".join("any" if size is None else str(size) for size in expected)
            raise DataError(f"{self.path}: {column.name} are {shape}; {self.model} takes ({sizes})")
        if 0 in shape:
            raise DataError(f"{self.path}: {column.name} are {shape}, which holds nothing; remove that file")
        kind, kinds = self.values[column.name].get_dtype(), FLOATS if column.classes is None else INTEGERS
        if kind not in kinds:
            raise DataError(f"{self.path}: {column.name} are stored as {kind}; store them as {' or '.join(kinds)}")
        if column.classes is not None:
            self._check_classes(column.name, column.classes)

    def _check_classes(self, name: str, classes: int) -> None:
        labels = self.values[name][:]
        outside = labels[(labels < 0) | (labels >= classes)]
        if len(outside):
            raise DataError(
                f"{self.path}: {name} hold {int(outside[0])}, outside [0, {classes}), the classes of {self.model}"
            )

    def check_finite(self) -> None:
        """Read the shard in pieces. Raises ``DataError`` naming the first value that is not finite."""
        for start in range(0, len(self), ROWS):
            for column in (column for column in self.columns if column.classes is None):
                values = self.values[column.name][start : start + ROWS].float()
                if not all(extreme.isfinite() for extreme in values.aminmax()):
                    row = int(values.flatten(1).isfinite().all(dim=1).logical_not().nonzero()[0])
                    raise DataError(_not_finite(self.path, column.name, start + row))

    def row(self, index: int) -> dict[str, Tensor]:
        """Return one sample by the network's arguments, each (1, ...)."""
        values = {column.argument: self._value(column, index) for column in self.columns}
        return values if self.grid is None else {**values, GRID: torch.tensor([self.grid])}

    def _value(self, column: Column, index: int) -> Tensor:
        value: Tensor = self.values[column.name][index : index + 1]
        if column.classes is not None:
            return value.long()
        if not value.float().isfinite().all():
            raise DataError(_not_finite(self.path, column.name, index))
        return value.float()


def _latents_of(preset: Preset, grid: Grid | None) -> Column:
    """Return the column of latents, whose tokens make up a grid."""
    shape = preset.latent_shape if grid is None else (grid[0] * grid[1], *preset.latent_shape[1:])
    return Column("latents", "latents", shape)


def random_rows(source: LatentSource, count: int, generator: torch.Generator) -> Tensor:
    """Return random indices (count,) of samples that can share a batch."""
    if isinstance(source, ShardDirectory):
        return source.random_rows(count, generator)
    return torch.randint(len(source), (count,), generator=generator)


def _not_finite(path: Path, name: str, index: int) -> str:
    return f"{path}: {name}[{index}] holds NaN, infinity or a value beyond fp32; remove that sample"
