"""Metadata files with a row for each picture: ``metadata.jsonl``, ``.csv`` or ``.parquet``. Imports no torch."""

from __future__ import annotations

import csv
import io
import json
import os
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyexport.encoding.walking import PICTURES, files_below
from dyexport.errors import DataError, missing_extras, reason

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CSV, PARQUET = ".csv", ".parquet"
FILE_NAME = "file_name"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a metadata file, with the number of its last line; of a Parquet file the number is that of the row."""

    file: Path
    number: int
    values: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.file}, {'row' if self.file.suffix == PARQUET else 'line'} {self.number}"


def metadata_files(root: Path) -> list[Path]:
    """Return the metadata files in a folder and below."""
    return [file for file in files_below(root) if file.name in METADATA]


def read_metadata(root: Path, pictures: Collection[Path]) -> dict[Path, Row]:
    """Return the rows of all metadata files in ``root`` and below, by picture.

    The column ``file_name`` is relative to the folder of the file. Raises ``DataError`` for a row without a picture,
    for two rows of one picture, and for files that cannot be read.
    """
    known = {_key(picture): picture for picture in pictures}
    described: dict[Path, Row] = {}
    for row in (row for file in metadata_files(root) for row in rows_of(file)):
        name = row.values.get(FILE_NAME)
        if not isinstance(name, str) or not name:
            columns = ", ".join(str(column) for column in row.values)
            raise DataError(
                f"{row}: no {FILE_NAME} among its columns ({columns}); name the picture, relative to {row.file.parent}"
            )
        if (picture := known.get(_key(row.file.parent / name))) is None:
            raise _unknown(row, name, root)
        if picture in described:
            raise DataError(f"{row}: {name} is described in {described[picture]} too; keep one of them")
        described[picture] = row
    return described


def _key(file: Path) -> str:
    """Return a path without detours, in composed characters: archives of macOS have names in decomposed ones."""
    return unicodedata.normalize("NFC", os.path.normpath(file))


def _unknown(row: Row, name: str, root: Path) -> DataError:
    if (row.file.parent / name).exists():
        return DataError(
            f"{row}: {name} is not read: it is hidden, outside {root}, or none of {', '.join(PICTURES)}; save it as a "
            "PNG in the folder, or remove the row"
        )
    return DataError(f"{row}: no picture {name} in {root}; add it, or remove the row")


def has_column(root: Path, name: str) -> bool:
    """Return whether a row of a metadata file in ``root`` or below has a column."""
    return any(name in row.values for file in metadata_files(root) for row in rows_of(file))


def rows_of(file: Path) -> Iterator[Row]:
    """Yield the rows of a metadata file; empty lines are left out.

    Raises ``DataError``, and ``MissingDependencyError`` for a Parquet file without pyarrow.
    """
    read = {CSV: _csv_rows, PARQUET: _parquet_rows}.get(file.suffix, _json_rows)
    return (Row(file=file, number=number, values=values) for number, values in read(file))


def _json_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text_of(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            problem = f"{error.msg} at character {error.pos + 1}"
            raise _unreadable(file, number, problem, "write one JSON object per line") from error
        except (ValueError, RecursionError) as error:
            raise _unreadable(file, number, reason(error), "write one picture per line") from error
        if not isinstance(values, dict):
            raise _unreadable(file, number, "no JSON object", "write one picture per line")
        yield number, values


def _csv_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text_of(file), newline=""), strict=True)
    try:
        columns = reader.fieldnames or ()
        if twice := next((name for name in columns if columns.count(name) > 1), None):
            raise _unreadable(file, reader.line_num, f"it names the column {twice} twice", "keep one of them")
        for values in reader:
            if None in values:
                problem = f"it has more fields than the {len(columns)} columns"
                raise _unreadable(file, reader.line_num, problem, "put texts with commas into double quotes")
            yield reader.line_num, values
    except csv.Error as error:
        raise _unreadable(file, reader.reader.line_num, reason(error), "write one picture per line") from error


def _parquet_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield rows with the columns of numbers and texts; embedded pictures and other structures are not read."""
    with missing_extras():
        from pyarrow import ArrowException, parquet, types
    try:
        with parquet.ParquetFile(file) as opened:
            columns = [
                field.name
                for field in opened.schema_arrow
                if not (types.is_nested(field.type) or types.is_binary(field.type) or types.is_large_binary(field.type))
            ]
            batches = opened.iter_batches(columns=columns)
            yield from enumerate((values for batch in batches for values in batch.to_pylist()), start=1)
    except (OSError, ValueError, ArrowException) as error:
        raise DataError(f"cannot read {file}: {reason(error)}; write it again, or as {METADATA[0]}") from error


def _unreadable(file: Path, number: int, problem: str, cure: str) -> DataError:
    return DataError(f"cannot read {file}, line {number}: {problem}; {cure}")


def text_of(file: Path) -> str:
    """Read a text file. Raises ``DataError``."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or reason(error)}; make it readable") from error
    except UnicodeDecodeError as error:
        raise DataError(f"cannot read {file}: {reason(error)}; save it as UTF-8") from error
