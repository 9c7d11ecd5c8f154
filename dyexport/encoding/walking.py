"""Files in a folder and below. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from dyexport.errors import DataError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
OTHER_FORMATS = frozenset(
    (".avif", ".dng", ".gif", ".heic", ".heif", ".ico", ".jfif", ".jp2", ".jpe", ".jxl", ".ppm", ".psd", ".svg", ".tga")
)
"""Suffixes of pictures that are not read."""


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and below; hidden ones are left out, links to folders are followed once.

    Raises ``DataError`` for a folder that cannot be listed.
    """
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not _loops(folder, place, name))
        yield from (Path(place, name) for name in sorted(names) if not name.startswith("."))


def pictures_below(folder: Path) -> Iterator[Path]:
    """Yield the pictures in a folder and below, by their suffixes."""
    return (file for file in files_below(folder) if is_picture_name(file))


def is_picture_name(file: Path) -> bool:
    """Return whether a file has the suffix of a picture."""
    return file.suffix.lower() in PICTURES


def _refuse(error: OSError) -> None:
    raise DataError(f"cannot list the folder {error.filename}: {error.strerror}; make it readable, or remove it")


def _loops(root: Path, place: str, name: str) -> bool:
    """Return whether a folder is a link to one that it lies in, below ``root``."""
    link = Path(place, name)
    if not os.path.islink(link):
        return False
    target, within = link.resolve(), (Path(place), *Path(place).parents)
    return any(folder.resolve().is_relative_to(target) for folder in within if folder.is_relative_to(root))
