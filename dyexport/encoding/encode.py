"""Pictures to shards of latents. A shard that exists, and was made of the same, is never made again."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dyexport.encoding.buckets import Size, nearest
from dyexport.encoding.encoders import CaptionEncoder, PictureEncoder
from dyexport.encoding.index import read_contents, warn_of_small
from dyexport.encoding.layout import Picture, PictureFolder
from dyexport.encoding.pixels import read_pixels
from dyexport.encoding.settings import EncodeSettings
from dyexport.errors import CheckpointError, UsageError
from dyexport.stages.file_records import digest_of
from dyexport.training.data_record import DataRecord, read_record
from dyexport.training.state import ORIGIN, origin_of, write_tensors

INDEX = "pictures.jsonl"  # next to the shards
READING, ENCODING = "reading pictures", "encoding"  # phases of progress
SHARD = "latents-{:06d}.safetensors"
SHARD_BYTES = 2**26
FEWEST, MOST = 16, 256  # samples of a shard
BATCH_PIXELS = 2**20  # encoded at a time
MOST_AT_ONCE = 64  # pictures encoded at a time
DIGITS = 6  # of statistics: the last ones depend on which shards were read again
WITH_CAPTION = 9  # samples with their caption to one without, for classifier-free guidance

EncodingProgress = Callable[[str, int, int, str], None]
"""Called with the name of a phase, the amount of work done, the amount in total, and a remark."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row of the data: a picture, perhaps mirrored, with the digest of its file and the size it is cropped to."""

    picture: Picture
    sha256: str
    size: Size
    mirrored: bool = False
    caption: str | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Inputs that the row depends on."""
        return self.sha256, *self.size, self.mirrored, self.picture.label, self.caption


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Number, sum and sum of squares of latents."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        exact = values.double()
        return cls(count=values.numel(), total=float(exact.sum()), squares=float(exact.square().sum()))

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            count=self.count + other.count, total=self.total + other.total, squares=self.squares + other.squares
        )

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def std(self) -> float:
        return math.sqrt(max(self.squares / self.count - self.mean**2, 0.0))


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A directory of latents, its record, the number of sizes of pictures, and how many shards were there before."""

    directory: Path
    record: DataRecord
    sizes: int
    shards: int
    reused: int


class Encoding:
    """One encoding: settings and the pictures of their ``folder``, checked as far as that needs no picture's contents.

    Raises ``UsageError``, ``DataError`` and ``CheckpointError``.
    """

    def __init__(self, settings: EncodeSettings, folder: PictureFolder | None = None) -> None:
        self.settings = settings
        self.folder = folder or settings.read_folder()
        self.pictures = PictureEncoder(settings)
        self.captions: CaptionEncoder | None = None
        if settings.takes_labels is False:
            assert settings.preset is not None
            assert settings.pipeline is not None
            self.captions = CaptionEncoder(settings.preset, settings.pipeline)

    @cached_property
    def options(self) -> dict[str, Any]:
        """Inputs that all shards depend on."""
        return {
            "size": self.pictures.side,
            "buckets": self.settings.buckets,
            "flip": self.settings.flip,
            "format": type(self.pictures.format).__name__,
            "vae": self.pictures.digest,
            "text": None if self.captions is None else self.captions.digest,
        }

    def samples(self, index: Path, progress: EncodingProgress) -> list[Sample]:
        """Read all pictures that ``index`` does not know, and list the samples. Raises ``DataError``."""
        pictures = self.folder.pictures
        reading = partial(progress, READING)
        files = [picture.file for picture in pictures]
        contents = read_contents(files, index, lambda done, total: reading(done, total, ""))
        sizes = [nearest(content.size, self.pictures.buckets) for content in contents]
        warn_of_small(files, contents, sizes)
        rows = sorted(
            zip(pictures, contents, sizes, strict=True), key=lambda row: self.pictures.buckets.index(row[2])
        )  # those of one size next to each other
        samples = [
            Sample(picture=picture, sha256=content.sha256, size=size, mirrored=mirrored, caption=picture.caption)
            for picture, content, size in rows
            for mirrored in ((False, True) if self.settings.flip else (False,))
        ]
        return samples if self.captions is None else list(_with_unconditional(samples, self.captions.unconditional))

    def digest_of(self, samples: Sequence[Sample]) -> str:
        """Identify samples by everything that they depend on."""
        return digest_of([self.options, [sample.key for sample in samples]])

    def write(self, samples: Sequence[Sample], out: Path, progress: EncodingProgress) -> Encoded:
        """Write the shards that are missing, and the record."""
        out.mkdir(parents=True, exist_ok=True)
        classes = self.folder.classes or None
        scaling = self.pictures.format.scaling(self.pictures.config)
        record = DataRecord(options=self.options, scaling=scaling, classes=classes)
        record.save(out)  # not complete
        moments, reused, shards = Moments(), 0, list(self._shards(samples, out))
        for path in set(out.glob(SHARD.format(0).replace("000000", "*"))) - {path for path, _ in shards}:
            path.unlink()
        done = 0
        for path, rows in shards:
            advance = partial(_advance, progress, done, len(samples))
            origin = self.digest_of(rows)
            if origin_of(path) == origin:
                reused += 1
                moments += Moments.of(_latents_of(path))
            else:
                tensors = self._encode(rows, advance)
                write_tensors(path, tensors, {ORIGIN: origin})
                moments += Moments.of(tensors["latents"])
            done += len(rows)
            advance(len(rows))
        record = record.model_copy(
            update={
                "complete": True,
                "grids": self._grids(shards),
                "samples": len(samples),
                "mean": round(moments.mean, DIGITS),
                "std": round(moments.std, DIGITS),
            }
        )
        record.save(out)
        return Encoded(
            directory=out,
            record=record,
            sizes=len({sample.size for sample in samples}),
            shards=len(shards),
            reused=reused,
        )

    def _shards(self, samples: Sequence[Sample], out: Path) -> Iterator[tuple[Path, Sequence[Sample]]]:
        size = max(min(SHARD_BYTES // self._bytes_of_sample(), MOST), FEWEST)
        groups = (list(rows) for _, rows in groupby(samples, key=lambda sample: sample.size))
        parts = (rows[start : start + size] for rows in groups for start in range(0, len(rows), size))
        for number, part in enumerate(parts):
            yield out / SHARD.format(number), part

    def _grids(self, shards: Sequence[tuple[Path, Sequence[Sample]]]) -> dict[str, tuple[int, int]]:
        """Return the rows and columns of tokens of shards, by name, where they are not the model's own."""
        preset = self.settings.preset
        if preset is None or not self.pictures.format.several_sizes:
            return {}
        grids = {path.name: self.pictures.grid(rows[0].size) for path, rows in shards}
        own = isqrt(preset.tokens)
        return {name: grid for name, grid in grids.items() if grid != (own, own)}

    def _bytes_of_sample(self) -> int:
        latents = 4 * math.prod(self.pictures.shape())
        return latents if self.captions is None else latents + self.captions.bytes_of_prompt

    def _encode(self, samples: Sequence[Sample], advance: Callable[[int], None]) -> Mapping[str, Tensor]:
        """Encode the rows of one shard, by the columns of a data file."""
        height, width = samples[0].size
        size = max(min(BATCH_PIXELS // (height * width), MOST_AT_ONCE), 1)
        batches = [samples[start : start + size] for start in range(0, len(samples), size)]
        latents: list[Tensor] = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for batch, pixels in _ahead(batches, pool, grayscale=self.pictures.grayscale):
                advance(sum(map(len, latents)))
                latents.append(self.pictures.encode(pixels))
                _check_finite(latents[-1], batch)
        if self.captions is None:
            labels = torch.tensor([row.picture.label for row in samples])
            return {"latents": torch.cat(latents), "labels": labels}
        return {"latents": torch.cat(latents), **self.captions.embed([row.caption or "" for row in samples])}


def check_output(out: Path, encoding: Encoding) -> None:
    """Raise ``UsageError`` unless ``out`` is missing, empty, or holds latents of the same options."""
    if out.resolve().is_relative_to(encoding.settings.folder.resolve()):
        raise UsageError(f"-o {out} lies in the folder of the pictures; give another directory")
    if out.exists() and not out.is_dir():
        raise UsageError(f"-o {out} is a file; give a directory")
    record = read_record(out)
    if record is None:
        if out.exists() and any(entry.name != INDEX for entry in out.iterdir()):
            raise UsageError(f"-o {out} is not empty and not of an encoding; give another directory")
        return
    names = {
        "size": "size",
        "buckets": "choice of --buckets",
        "flip": "choice of --flip",
        "format": "kind of model",
        "vae": "VAE",
        "text": "text encoder",
    }
    for option, name in names.items():
        if record.options.get(option) != encoding.options[option]:
            raise UsageError(f"-o {out} holds latents of another {name}; give another directory, or delete this one")


def _with_unconditional(samples: Sequence[Sample], prompt: str | None) -> Iterator[Sample]:
    """Yield samples, and after each nine of them one of them again with the unconditional prompt."""
    for place, sample in enumerate(samples):
        yield sample
        if prompt is not None and place % WITH_CAPTION == 0:
            yield replace(sample, caption=prompt)


def _ahead(
    batches: Sequence[Sequence[Sample]], pool: Executor, *, grayscale: bool
) -> Iterator[tuple[Sequence[Sample], Tensor]]:
    """Yield batches with their pixels; the pictures of the next one are read while one is encoded."""

    def read(sample: Sample) -> Tensor:
        return read_pixels(sample.picture.file, sample.size, mirrored=sample.mirrored, grayscale=grayscale)

    coming = [pool.submit(read, sample) for sample in batches[0]]
    for batch, following in zip(batches, [*batches[1:], ()], strict=True):
        pixels = torch.stack([picture.result() for picture in coming])
        coming = [pool.submit(read, sample) for sample in following]
        yield batch, pixels


def _latents_of(shard: Path) -> Tensor:
    """Read the latents of a shard, and not its embedded captions."""
    with safe_open(shard, framework="pt") as file:
        latents: Tensor = file.get_tensor("latents")
    return latents


def _check_finite(latents: Tensor, samples: Sequence[Sample]) -> None:
    finite = latents.flatten(1).isfinite().all(dim=1)  # (B,)
    if not finite.all():
        file = samples[int(finite.logical_not().nonzero()[0])].picture.file
        raise CheckpointError(f"the VAE makes NaN or infinity of {file}; give --vae with weights that are whole")


def _advance(progress: EncodingProgress, before: int, total: int, done: int) -> None:
    progress(ENCODING, before + done, total, f"{before + done} of {total} samples")
