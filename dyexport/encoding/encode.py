"""Pictures to shards of latents. Nothing that a shard holds is encoded again.

Shards depend on the pictures and settings alone, not on which were there before: samples are in the order of their
contents, and are encoded one by one, since results of a network differ in the last bits between sizes of a batch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dyexport.encoding.buckets import nearest
from dyexport.encoding.encoders import CaptionEncoder, PictureEncoder
from dyexport.encoding.index import read_contents, warn_of_profiles, warn_of_small
from dyexport.encoding.layout import PictureFolder
from dyexport.encoding.moments import Moments
from dyexport.encoding.samples import Sample, in_order
from dyexport.encoding.settings import EncodeSettings
from dyexport.encoding.stored_rows import PICTURES, PROMPTS, StoredRows, column_of
from dyexport.errors import UsageError
from dyexport.stages.file_records import digest_of
from dyexport.training.data_record import DataRecord, read_record
from dyexport.training.state import ORIGIN, origin_of, write_tensors

INDEX = "pictures.jsonl"  # next to the shards
READING, ENCODING = "reading pictures", "encoding"  # phases of progress
SHARD, SHARDS = "latents-{:06d}.safetensors", "latents-*.safetensors"
REPLACED = ".replaced"  # suffix of a shard of other samples, whose rows are still needed
SHARD_BYTES = 2**26
FEWEST, MOST = 16, 256  # samples of a shard
DIGITS = 6  # of statistics

EncodingProgress = Callable[[str, int, int, str], None]
"""Called with the name of a phase, the amount of work done, the amount in total, and a remark."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A directory of latents with its record, and numbers: sizes of pictures, shards, samples that were not encoded."""

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
        pictures, buckets = self.folder.pictures, self.pictures.buckets
        reading = partial(progress, READING)
        files = [picture.file for picture in pictures]
        contents = read_contents(files, index, lambda done, total: reading(done, total, ""))
        sizes = [nearest(content.size, buckets) for content in contents]
        warn_of_small(files, contents, sizes)
        warn_of_profiles(files, contents)
        samples = [
            Sample(
                picture=picture,
                sha256=content.sha256,
                size=size,
                profiled=content.profile == "converted",
                mirrored=mirrored,
                caption=picture.caption,
            )
            for picture, content, size in zip(pictures, contents, sizes, strict=True)
            for mirrored in ((False, True) if self.settings.flip else (False,))
        ]
        return in_order(samples, buckets, None if self.captions is None else self.captions.unconditional)

    def digest_of(self, samples: Sequence[Sample]) -> str:
        """Identify samples by everything that they depend on."""
        return digest_of([self.options, [sample.key for sample in samples]])

    def write(
        self, samples: Sequence[Sample], out: Path, progress: EncodingProgress, earlier: Iterable[Path] = ()
    ) -> Encoded:
        """Write the shards that are missing, and the record.

        Rows are copied from the shards that are in ``out``, and from those of ``earlier`` encodings, where these have
        them. A shard of other samples is removed once no row of it is needed.
        """
        out.mkdir(parents=True, exist_ok=True)
        scaling = self.pictures.format.scaling(self.pictures.config)
        record = DataRecord(options=self.options, scaling=scaling, classes=self.folder.classes or None)
        shards = dict(self._shards(samples, out))
        missing = {path: rows for path, rows in shards.items() if origin_of(path) != self.digest_of(rows)}
        whole = shards.keys() - missing.keys()
        if missing or whole != set(out.glob(SHARDS)):
            record.save(out)  # not complete
        replaced = _set_aside(out, whole)
        stored = StoredRows([*replaced, *earlier] if missing else [])
        removable = self._removable(replaced, stored, missing)
        moments, reused, done = Moments(), 0, 0
        for path, rows in shards.items():
            if path in missing:
                advance = partial(_advance, progress, done, len(samples))
                tensors = self._encode(rows, stored, advance)
                write_tensors(path, tensors, {ORIGIN: self.digest_of(rows)})
                moments += Moments.of(tensors["latents"])
                reused += sum(self._picture_digest(row) in stored for row in rows)
                for file in removable[path]:
                    file.unlink()
            else:
                moments += Moments.of(_latents_of(path))
                reused += len(rows)
            done += len(rows)
            _advance(progress, 0, len(samples), done)
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

    def _removable(
        self, replaced: Sequence[Path], stored: StoredRows, missing: Mapping[Path, Sequence[Sample]]
    ) -> Mapping[Path, Sequence[Path]]:
        """Group replaced shards by the missing shard that is the last to need them; remove those that none needs."""
        last = {file: path for path, rows in missing.items() for file in stored.files(self._digests(rows))}
        removable: dict[Path, list[Path]] = defaultdict(list)
        for file in replaced:
            if file in last:
                removable[last[file]].append(file)
            else:
                file.unlink()
        return removable

    def _grids(self, shards: Mapping[Path, Sequence[Sample]]) -> dict[str, tuple[int, int]]:
        """Return the rows and columns of tokens of shards, by name, where they are not the model's own."""
        preset = self.settings.preset
        if preset is None or not self.pictures.format.several_sizes:
            return {}
        grids = {path.name: self.pictures.grid(rows[0].size) for path, rows in shards.items()}
        own = isqrt(preset.tokens)
        return {name: grid for name, grid in grids.items() if grid != (own, own)}

    def _bytes_of_sample(self) -> int:
        latents = 4 * math.prod(self.pictures.shape())
        return latents if self.captions is None else latents + self.captions.bytes_of_prompt

    def _picture_digest(self, sample: Sample) -> bytes:
        return self.pictures.digest_of(sample.pixels)

    def _digests(self, samples: Iterable[Sample]) -> Iterator[bytes]:
        """Yield digests of the latents and of the embedded captions of samples."""
        for sample in samples:
            yield self._picture_digest(sample)
            if self.captions is not None:
                yield self.captions.digest_of(sample.caption or "")

    def _encode(
        self, samples: Sequence[Sample], stored: StoredRows, advance: Callable[[int], None]
    ) -> Mapping[str, Tensor]:
        """Return the columns of one shard, encoding what is not stored."""
        pictures = [self._picture_digest(sample) for sample in samples]
        latents = {digest: row["latents"] for digest, row in stored.read(pictures, ["latents"]).items()}
        unknown = {digest: sample for digest, sample in zip(pictures, samples, strict=True) if digest not in latents}
        for digest, encoded in zip(unknown, self.pictures.latents(list(unknown.values())), strict=True):
            advance(len(latents))
            latents[digest] = encoded
        tensors = {"latents": torch.cat([latents[digest] for digest in pictures]), PICTURES: column_of(pictures)}
        if self.captions is None:
            return {**tensors, "labels": torch.tensor([sample.picture.label for sample in samples])}
        return {**tensors, **self._prompts([sample.caption or "" for sample in samples], stored)}

    def _prompts(self, captions: Sequence[str], stored: StoredRows) -> Mapping[str, Tensor]:
        """Return embedded captions by column (n, ...), with their digests."""
        assert self.captions is not None
        digests = [self.captions.digest_of(caption) for caption in captions]
        rows = stored.read(digests, self.captions.columns)
        for digest, caption in zip(digests, captions, strict=True):
            if digest not in rows:
                rows[digest] = self.captions.embed(caption)
        columns = {name: torch.cat([rows[digest][name] for digest in digests]) for name in self.captions.columns}
        return {**columns, PROMPTS: column_of(digests)}


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


def _set_aside(out: Path, whole: Collection[Path]) -> list[Path]:
    """Rename the shards in a directory but for those that are whole, and return all that were ever set aside."""
    for path in [path for path in out.glob(SHARDS) if path not in whole]:
        path.rename(path.with_name(f"{origin_of(path)}{REPLACED}"))
    return sorted(out.glob(f"*{REPLACED}"))


def _latents_of(shard: Path) -> Tensor:
    """Read the latents of a shard, and not its embedded captions."""
    with safe_open(shard, framework="pt") as file:
        latents: Tensor = file.get_tensor("latents")
    return latents


def _advance(progress: EncodingProgress, before: int, total: int, done: int) -> None:
    progress(ENCODING, before + done, total, f"{before + done} of {total} samples")
