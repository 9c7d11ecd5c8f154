"""Rows of latents and of embedded captions in shards, by digests of what they were encoded from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

PICTURES, PROMPTS = "picture_digests", "prompt_digests"  # columns (n, 32) of bytes


class _Place(NamedTuple):
    file: Path
    row: int


class StoredRows:
    """Index of the rows of shards; a file that cannot be read, or has no digests, has none."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._places: dict[bytes, _Place] = {}
        for file in files:
            for row, digest in _digests_of(file):
                self._places.setdefault(digest, _Place(file, row))

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._places

    def files(self, digests: Iterable[bytes]) -> set[Path]:
        """Return the files that hold rows."""
        return {self._places[digest].file for digest in digests if digest in self._places}

    def read(self, digests: Iterable[bytes], columns: Sequence[str]) -> dict[bytes, Mapping[str, Tensor]]:
        """Return the rows that are stored, each (1, ...) by column; each file is opened once."""
        known = sorted((self._places[digest], digest) for digest in set(digests) if digest in self._places)
        rows: dict[bytes, Mapping[str, Tensor]] = {}
        for path, places in groupby(known, key=lambda place: place[0].file):
            with safe_open(path, framework="pt") as file:
                values = {column: file.get_slice(column) for column in columns}
                for (_, row), digest in places:
                    rows[digest] = {column: values[column][row : row + 1] for column in columns}
        return rows


def column_of(digests: Sequence[bytes]) -> Tensor:
    """Return digests as a column of a shard (n, 32)."""
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).reshape(len(digests), -1)


def _digests_of(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with safe_open(path, framework="pt") as file:
            columns = [file.get_tensor(name) for name in (PICTURES, PROMPTS) if name in file.keys()]  # noqa: SIM118
    except (OSError, SafetensorError):
        return
    for column in columns:
        yield from enumerate(bytes(row) for row in column.numpy())
