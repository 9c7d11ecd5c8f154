"""Captions of pictures, of metadata files or of a text file next to each picture. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dyexport.encoding.metadata import Row, metadata_files, read_metadata, text_of
from dyexport.encoding.walking import files_below
from dyexport.errors import DataError

SIDECAR = ".txt"
COLUMNS = ("text", "caption", "prompt")


def read_captions(root: Path, pictures: Sequence[Path]) -> dict[Path, str]:
    """Return the captions of pictures in ``root`` and below, by picture.

    A metadata file has one of ``COLUMNS``. Raises ``DataError`` for captions of both kinds, for one without a picture,
    and for files that cannot be read.
    """
    by_stem: dict[Path, list[Path]] = {}
    for picture in pictures:
        by_stem.setdefault(picture.with_suffix(""), []).append(picture)
    sidecars = [file for file in files_below(root) if file.suffix.lower() == SIDECAR]
    metadata = next(iter(metadata_files(root)), None)
    if metadata is None:
        return _from_sidecars(root, sidecars, by_stem)
    if both := next((file for file in sidecars if file.with_suffix("") in by_stem), None):
        raise DataError(
            f"{root} has captions in {metadata.relative_to(root)} and in {both.relative_to(root)}; "
            "keep one kind of them"
        )
    return {picture: _caption(row) for picture, row in read_metadata(root, pictures).items()}


def _from_sidecars(root: Path, files: Sequence[Path], by_stem: dict[Path, list[Path]]) -> dict[Path, str]:
    captions: dict[Path, str] = {}
    for file in files:
        described = by_stem.get(file.with_suffix(""))
        if described is None:
            raise DataError(f"a caption without a picture: {file.relative_to(root)} in {root}; add it, or remove this")
        captions |= dict.fromkeys(described, text_of(file).strip())
    return captions


def _caption(row: Row) -> str:
    columns = [name for name in COLUMNS if row.values.get(name) is not None]
    if len(columns) != 1:
        problem = f"both {columns[0]} and {columns[1]}" if columns else "no caption"
        raise DataError(f"{row}: {problem}; give a text in one column, {', '.join(COLUMNS)}")
    if not isinstance(caption := row.values[columns[0]], str):
        raise DataError(f"{row}: {columns[0]} is {caption!r}; give a text")
    return caption.strip()
