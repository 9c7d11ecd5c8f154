"""Digests of values and files, and what differs between files and what was recorded of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dyexport.bundle.manifest import FileRecord
from dyexport.digests import note, recall, sha256_of


def digest_of(value: Any) -> str:
    """Identify a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_of_spans(path: Path, spans: Sequence[tuple[int, int]]) -> str:
    """Identify parts of a file, each an offset and a length. They are read once, as the file itself is."""
    fact = f"spans {sha256_of(path)} {digest_of(list(spans))}"
    if (known := recall(fact)) is not None:
        return known
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for offset, length in spans:
            file.seek(offset)
            while length:
                piece = file.read(min(length, 1 << 24))
                digest.update(piece)
                length -= len(piece)
    note(fact, digest.hexdigest())
    return digest.hexdigest()


def describe(path: Path) -> dict[str, FileRecord]:
    """Return a record of every file below ``path``, or of ``path`` itself under the name '.'."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return {
        str(file.relative_to(path)): FileRecord(sha256=sha256_of(file), bytes=file.stat().st_size) for file in files
    }


def record_of(content: bytes) -> FileRecord:
    """Return the record of a file with these bytes."""
    return FileRecord(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))


def damage(path: Path, records: Mapping[str, FileRecord]) -> Iterator[str]:
    """Yield what differs between ``path`` and the records of its files."""
    for name, record in records.items():
        file = path / name
        if not file.is_file():
            yield f"{file} is missing"
        elif file.stat().st_size != record.bytes or sha256_of(file) != record.sha256:
            yield f"{file} is damaged"
    present = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    yield from (f"{path / name} is not of this build" for name in sorted(present - records.keys()))
