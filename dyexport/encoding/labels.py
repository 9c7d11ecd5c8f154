"""Class labels of pictures, of the column ``label`` of metadata files. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from dyexport.encoding.metadata import CSV, Row, read_metadata
from dyexport.errors import DataError

LABEL = "label"
NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")


def read_labels(
    root: Path, pictures: Sequence[Path], names: tuple[str, ...] | None
) -> tuple[dict[Path, int], tuple[str, ...]]:
    """Return the labels of pictures in ``root`` and below, by picture, and the names of the classes.

    A value is the name of a class, or a whole number: the label itself. ``names`` are those of all classes in the
    order of the labels; by default they are the names that occur, sorted, and () for numbers. Raises ``DataError`` for
    pictures without a label, for values of both kinds, and for a class that ``names`` do not have.
    """
    rows = read_metadata(root, pictures)
    if missing := [picture for picture in pictures if picture not in rows]:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(
            f"pictures without labels in {root}: {missing[0].relative_to(root)}{others}; add a line for each to a "
            "metadata file"
        )
    values = {picture: _value(row) for picture, row in rows.items()}
    occurring = sorted({value for value in values.values() if isinstance(value, str)})
    numbers = {picture: value for picture, value in values.items() if isinstance(value, int)}
    if occurring and numbers:
        number = next(iter(numbers.values()))
        raise DataError(f"{root} has labels of two kinds, {occurring[0]!r} and {number}; give names or numbers alone")
    if numbers:
        _check_numbers(rows, numbers, names)
        return numbers, names or ()
    classes = names or tuple(occurring)
    places = {name: label for label, name in enumerate(classes)}
    if unknown := [picture for picture, value in values.items() if value not in places]:
        row = rows[unknown[0]]
        raise DataError(f"{row}: label {values[unknown[0]]!r} is no line of --classes; add it, or remove the picture")
    return {picture: places[str(value)] for picture, value in values.items()}, classes


def _value(row: Row) -> str | int:
    """Return the number or the name in a row. CSV has no types: digits are a number, and ``1.0`` is no name."""
    value = row.values.get(LABEL)
    if isinstance(value, str) and row.file.suffix == CSV and NUMBER.fullmatch(value.strip()):
        value = int(value) if value.strip().isdecimal() else value
    elif isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise DataError(f"{row}: label is {value!r}; give the name of a class, or a whole number from 0 on")


def _check_numbers(rows: Mapping[Path, Row], numbers: Mapping[Path, int], names: tuple[str, ...] | None) -> None:
    for picture, number in numbers.items() if names else ():
        if number >= len(names or ()):
            raise DataError(f"{rows[picture]}: label is {number}, and --classes names {len(names or ())}; add lines")
