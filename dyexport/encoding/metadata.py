"""Metadata files: a row for each picture, in ``metadata.jsonl`` or ``metadata.csv``. Imports no torch."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyexport.encoding.walking import files_below
from dyexport.errors import DataError, reason

METADATA = ("metadata.jsonl", "metadata.csv")
FILE_NAME = "file_name"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a metadata file, with the number of its line."""

    file: Path
    number: int
    values: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.file}, line {self.number}"


def metadata_files(root: Path) -> list[Path]:
    """Return the metadata files in a folder and below."""
    return [file for file in files_below(root) if file.name in METADATA]


def read_metadata(root: Path, pictures: Collection[Path]) -> dict[Path, Row]:
    """Return the rows of all metadata files in ``root`` and below, by picture.

    The column ``file_name`` is relative to the folder of the file. Raises ``DataError`` for a row without a picture,
    for two rows of one picture, and for files that cannot be read.
    """
    known, described = frozenset(pictures), dict[Path, Row]()
    for row in (row for file in metadata_files(root) for row in rows_of(file)):
        name = row.values.get(FILE_NAME)
        if not isinstance(name, str) or not name:
            columns = ", ".join(str(column) for column in row.values)
            raise DataError(
                f"{row}: no {FILE_NAME} among its columns ({columns}); name the picture, relative to {row.file.parent}"
            )
        picture = Path(os.path.normpath(row.file.parent / name))
        if picture not in known:
            raise DataError(f"{row}: no picture {name} in {root}; add it, or remove the line")
        if picture in described:
            raise DataError(f"{row}: {name} is described in line {described[picture].number} too; keep one of them")
        described[picture] = row
    return described


def has_column(root: Path, name: str) -> bool:
    """Return whether the first row of a metadata file in ``root`` or below has a column."""
    first = (next(rows_of(file), None) for file in metadata_files(root))
    return any(row is not None and name in row.values for row in first)


def rows_of(file: Path) -> Iterator[Row]:
    """Yield the rows of a metadata file; empty lines are left out. Raises ``DataError``."""
    text, number = text_of(file), 0
    try:
        if file.suffix == ".csv":
            reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            for values in reader:
                number = reader.line_num
                yield Row(file=file, number=number, values=values)
            return
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                values = json.loads(line)
                if not isinstance(values, dict):
                    raise ValueError("no JSON object")
                yield Row(file=file, number=number, values=values)
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at character {error.pos + 1}"
        raise DataError(f"cannot read {file}, line {number}: {problem}; write one JSON object per line") from error
    except (csv.Error, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {file}, line {number}: {reason(error)}; write one picture per line") from error


def text_of(file: Path) -> str:
    """Read a text file. Raises ``DataError``."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file}: {reason(error)}; save it as UTF-8") from error
