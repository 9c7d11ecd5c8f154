"""Files in a folder and below. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and below; hidden ones are left out, links to folders are followed."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in sorted(names) if not name.startswith("."))


def pictures_below(folder: Path) -> Iterator[Path]:
    """Yield the pictures in a folder and below, by their suffixes."""
    return (file for file in files_below(folder) if is_picture_name(file))


def is_picture_name(file: Path) -> bool:
    """Return whether a file has the suffix of a picture."""
    return file.suffix.lower() in PICTURES
