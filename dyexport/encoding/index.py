"""Contents of pictures, each of which was decoded once: a file that did not change is not read again."""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from dyexport.encoding.buckets import Size
from dyexport.errors import DataError, DyexportWarning
from dyexport.files import storage_errors
from dyexport.pictures.opening import QUARTER_TURNS, check_range, orientation_of, problem_of
from dyexport.pictures.profiles import Profile, profile_of
from dyexport.progress import Progress

CHUNK = 256  # pictures between two reports
SHOWN = 3  # names in a message


class Contents(NamedTuple):
    """A picture that was read: its SHA-256, its size when it is upright, and how its color profile is treated."""

    sha256: str
    size: Size
    profile: Profile


def read_contents(pictures: Sequence[Path], index: Path, progress: Progress) -> list[Contents]:
    """Return the contents of each picture, having decoded those that ``index`` does not know yet.

    Raises ``DataError`` that names pictures which cannot be decoded.
    """
    known = _known(index)
    seals = [_seal(picture) for picture in pictures]
    unread = [(picture, seal) for picture, seal in zip(pictures, seals, strict=True) if seal not in known]
    unreadable: list[tuple[Path, str]] = []
    progress(len(pictures) - len(unread), len(pictures))
    with storage_errors(index), index.open("a", encoding="utf-8") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(unread), CHUNK):
            chunk = unread[start : start + CHUNK]
            for (picture, seal), read in zip(chunk, pool.map(_read, (one for one, _ in chunk)), strict=True):
                if isinstance(read, str):
                    unreadable.append((picture, read))
                else:
                    known[seal] = read
                    file.write(f"{json.dumps([seal, read.sha256, *read.size, read.profile])}\n")
            file.flush()
            progress(len(pictures) - len(unread) + start + len(chunk), len(pictures))
    if unreadable:
        raise _error(unreadable)
    return [known[seal] for seal in seals]


def warn_of_small(files: Sequence[Path], contents: Sequence[Contents], sizes: Sequence[Size]) -> None:
    """Warn of pictures that are smaller than what they are cropped to."""
    small = [
        (file, content.size, size)
        for file, content, size in zip(files, contents, sizes, strict=True)
        if content.size.height < size.height or content.size.width < size.width
    ]
    if small:
        file, own, size = min(small, key=lambda row: min(row[1]))
        warnings.warn(
            f"{len(small)} of {len(files)} pictures are enlarged, and so are blurred: the smallest, {file}, is "
            f"{own.width} x {own.height} px and becomes {size.width} x {size.height}; remove them, or give larger ones",
            DyexportWarning,
            stacklevel=2,
        )


def warn_of_profiles(files: Sequence[Path], contents: Sequence[Contents]) -> None:
    """Warn of pictures whose color profile is ignored."""
    broken = [file for file, content in zip(files, contents, strict=True) if content.profile == "broken"]
    if broken:
        warnings.warn(
            f"{len(broken)} of {len(files)} pictures, such as {broken[0]}, have a color profile that is damaged or of "
            "another kind of picture, and are read as sRGB; save them in sRGB if their colors are wrong",
            DyexportWarning,
            stacklevel=2,
        )


def _error(unreadable: Sequence[tuple[Path, str]]) -> DataError:
    (first, problem), others = unreadable[0], [str(picture) for picture, _ in unreadable[1:]]
    rest = f"; so are {', '.join(others[:SHOWN])}" if others else ""
    more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
    return DataError(f"cannot read the picture {first}: {problem}{rest}{more}; remove it, or save it again")


def _read(picture: Path) -> Contents | str:
    """Hash a file and decode it; return why if that is not possible. JPEG is decoded in eighths, which reads all."""
    from PIL import Image

    try:
        content = picture.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            check_range(image)
            profile, whole = profile_of(image), image.size
            reduced = image.draft("RGB", (1, 1)) is not None
            image.load()
            width, height = whole if reduced else image.size
            turned = orientation_of(image) in QUARTER_TURNS
    except Exception as error:  # damaged files raise what Pillow's parsers and struct raise
        return problem_of(error)
    size = Size(width, height) if turned else Size(height, width)
    return Contents(hashlib.sha256(content).hexdigest(), size, profile)


def _seal(picture: Path) -> str:
    """Identify the state of a file by its path, size, and times of modification and of change."""
    try:
        status = picture.stat()
    except OSError as error:  # a link to nothing
        raise _error([(picture, problem_of(error))]) from error
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {picture.absolute()}"


def _known(index: Path) -> dict[str, Contents]:
    return dict(_lines(index)) if index.exists() else {}


def _lines(index: Path) -> Iterator[tuple[str, Contents]]:
    """Yield seals and contents; a line that a kill cut short, or without a profile, is left out."""
    with index.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                seal, sha256, height, width, profile = json.loads(line)
            except ValueError:
                continue
            yield seal, Contents(sha256, Size(height, width), profile)
