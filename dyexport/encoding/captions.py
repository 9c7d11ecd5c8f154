"""Captions of pictures: ``metadata.jsonl``, ``metadata.csv``, or a text file next to each picture. Imports no torch."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dyexport.encoding.walking import files_below
from dyexport.errors import DataError, reason

METADATA = ("metadata.jsonl", "metadata.csv")
SIDECAR = ".txt"
FILE_NAME = "file_name"
COLUMNS = ("text", "caption", "prompt")


class _Row(NamedTuple):
    """A line of a metadata file."""

    number: int
    values: dict[str, Any]


def read_captions(root: Path, pictures: Sequence[Path]) -> dict[Path, str]:
    """Return the captions of pictures in ``root`` and below, by picture.

    A metadata file, in any folder, has a column ``file_name``, relative to its folder, and one of ``COLUMNS``. Raises
    ``DataError`` for captions of both kinds, for one without a picture, and for files that cannot be read.
    """
    metadata = [file for file in files_below(root) if file.name in METADATA]
    sidecars = [file for file in files_below(root) if file.suffix.lower() == SIDECAR]
    if metadata and sidecars:
        raise DataError(
            f"{root} has captions in {metadata[0].relative_to(root)} and in {sidecars[0].relative_to(root)}; "
            "keep one kind of them"
        )
    if metadata:
        return _from_metadata(metadata, set(pictures))
    return _from_sidecars(root, sidecars, pictures)


def _from_sidecars(root: Path, files: Sequence[Path], pictures: Sequence[Path]) -> dict[Path, str]:
    by_stem: dict[Path, list[Path]] = {}
    for picture in pictures:
        by_stem.setdefault(picture.with_suffix(""), []).append(picture)
    captions: dict[Path, str] = {}
    for file in files:
        described = by_stem.get(file.with_suffix(""))
        if described is None:
            raise DataError(f"a caption without a picture: {file.relative_to(root)} in {root}; add it, or remove this")
        captions |= dict.fromkeys(described, _text_of(file).strip())
    return captions


def _from_metadata(files: Sequence[Path], pictures: set[Path]) -> dict[Path, str]:
    captions: dict[Path, str] = {}
    for file in files:
        for number, row in _rows(file):
            name = row.get(FILE_NAME)
            if not isinstance(name, str) or not name:
                raise DataError(f"{file}, line {number}: no {FILE_NAME}; name the picture, relative to {file.parent}")
            picture = Path(os.path.normpath(file.parent / name))
            if picture not in pictures:
                raise DataError(f"{file}, line {number}: a caption without a picture, {name}; add it, or remove this")
            if picture in captions:
                raise DataError(f"{file}, line {number}: {name} has a caption already; keep one of them")
            captions[picture] = _caption(file, number, row)
    return captions


def _caption(file: Path, number: int, row: dict[str, Any]) -> str:
    columns = [name for name in COLUMNS if row.get(name) is not None]
    if len(columns) != 1 or not isinstance(row[columns[0]], str):
        problem = f"both {columns[0]} and {columns[1]}" if len(columns) > 1 else "no caption"
        raise DataError(f"{file}, line {number}: {problem}; give a text in one column, {', '.join(COLUMNS)}")
    return str(row[columns[0]]).strip()


def _rows(file: Path) -> Iterator[_Row]:
    """Yield the lines of a metadata file with their numbers; empty lines are left out."""
    text = _text_of(file)
    try:
        if file.suffix == ".csv":
            reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            yield from (_Row(reader.line_num, row) for row in reader)
            return
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                values = json.loads(line)
                if not isinstance(values, dict):
                    raise ValueError(f"line {number} is no JSON object")
                yield _Row(number, values)
    except (csv.Error, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {file}: {reason(error)}; write one picture per line") from error


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file}: {reason(error)}; save it as UTF-8") from error
