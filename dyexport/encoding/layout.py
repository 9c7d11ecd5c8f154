"""Folders of pictures: subfolders that are classes, or metadata with labels or captions. Imports no torch.

Layouts are those of Hugging Face ``datasets``' imagefolder, whose splits may be the top-level folders. What can be
checked without opening a picture is checked here.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dyexport.encoding.captions import SIDECAR, read_captions
from dyexport.encoding.labels import LABEL, read_labels
from dyexport.encoding.metadata import METADATA, has_column
from dyexport.encoding.walking import OTHER_FORMATS, PICTURES, files_below, is_picture_name, pictures_below
from dyexport.errors import DataError, DyexportWarning, UsageError, reason

TRAIN = ("train", "training")
SPLITS = frozenset({*TRAIN, "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"})


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture, with its class label or its caption."""

    file: Path
    label: int | None = None
    caption: str | None = None


@dataclass(frozen=True, kw_only=True)
class PictureFolder:
    """Pictures in the order of their labels and names.

    ``classes`` are names by label; () for captions, and for labels that are numbers.
    """

    root: Path
    pictures: tuple[Picture, ...]
    classes: tuple[str, ...] = ()

    def name_of(self, picture: Picture) -> str:
        """Return the name of a picture, relative to the folder."""
        return picture.file.relative_to(self.root).as_posix()


def is_picture_folder(folder: Path) -> bool:
    """Return whether a directory holds pictures, here or below, and no safetensors files."""
    try:
        entries = list(folder.iterdir())
    except (OSError, ValueError):
        return False
    return all(entry.suffix != ".safetensors" for entry in entries) and any(pictures_below(folder))


def read_folder(
    folder: Path, *, takes_labels: bool | None, split: str | None = None, names: Path | None = None
) -> PictureFolder:
    """List the pictures of a folder with their labels or captions.

    ``takes_labels`` is None where the model is not known: the folder must then have classes. ``names`` is a file with
    the name of a class per line, in the order of the labels; by default they are the names that occur, sorted.
    Raises ``DataError`` for anything but one whole layout, and ``UsageError`` for a split that does not exist. Warns of
    pictures in formats that are not read.
    """
    if not folder.is_dir():
        problem = "is no directory" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {problem}; give a folder of pictures")
    root = _split_of(folder, split)
    if next(pictures_below(root), None) is None:
        raise DataError(f"{root} holds no pictures ({', '.join(PICTURES)}); give a folder that does")
    _warn_of_other_formats(root)
    if takes_labels is False:
        if names is not None:
            raise UsageError("--classes names class labels, and this model takes captions; leave it out")
        return _with_captions(root)
    classes = None if names is None else _read_names(names)
    if has_column(root, LABEL):
        return _with_labels_of_metadata(root, classes)
    return _with_labels_of_folders(root, classes, known=takes_labels is not None)


def _warn_of_other_formats(root: Path) -> None:
    others = [file for file in files_below(root) if file.suffix.lower() in OTHER_FORMATS]
    if others:
        formats = ", ".join(sorted({file.suffix.lower() for file in others}))
        warnings.warn(
            f"{root} holds pictures in formats that are not read ({formats}), such as "
            f"{others[0].relative_to(root)}; {len(others)} are left out; save them as PNG or JPEG to use them",
            DyexportWarning,
            stacklevel=2,
        )


def _split_of(folder: Path, split: str | None) -> Path:
    """Return the folder of a split, by default the one for training; the folder itself if it has no splits."""
    entries = list(_visible(folder))
    splits = sorted(entry.name for entry in entries if entry.is_dir() and entry.name.lower() in SPLITS)
    others = [entry for entry in entries if (entry.is_dir() and entry.name not in splits) or _is_picture(entry)]
    if not splits or others:
        if split is not None:
            raise UsageError(f"--split is {split!r}, and {folder} has no splits as its subfolders; leave it out")
        return folder
    chosen = next((name for name in splits if name.lower() in TRAIN), None) if split is None else split
    if chosen not in splits:
        asked = "" if split is None else f", not {split!r}"
        raise UsageError(f"{folder} has the splits {', '.join(splits)}{asked}; give one of them as --split")
    if metadata := [entry.name for entry in entries if entry.name in METADATA]:
        warnings.warn(
            f"{metadata[0]} in {folder} is not read, for {folder} has splits; move its rows to {folder / chosen}",
            DyexportWarning,
            stacklevel=3,
        )
    return folder / chosen


def _with_labels_of_metadata(root: Path, names: tuple[str, ...] | None) -> PictureFolder:
    files = sorted(pictures_below(root))
    labels, classes = read_labels(root, files, names)
    return _labeled(root, [Picture(file=file, label=labels[file]) for file in files], classes)


def _labeled(root: Path, pictures: list[Picture], classes: tuple[str, ...]) -> PictureFolder:
    in_order = sorted(pictures, key=lambda one: (one.label, one.file))
    return PictureFolder(root=root, pictures=tuple(in_order), classes=classes)


def _with_labels_of_folders(root: Path, names: tuple[str, ...] | None, *, known: bool) -> PictureFolder:
    folders = sorted(entry for entry in _visible(root) if entry.is_dir())
    lone = next((entry for entry in sorted(_visible(root)) if _is_picture(entry)), None)
    if not known and (captions := _first_captions(root)) is not None:
        raise DataError(
            f"{root} has captions ({captions.relative_to(root)}), which a model of prompts takes; "
            "give --pipeline with its text encoders, or --model with a model of classes to ignore them"
        )
    if lone is not None and folders:
        raise DataError(
            f"{root} holds pictures in itself ({lone.name}) and in subfolders ({folders[0].name}); "
            "put each picture into the subfolder of its class"
        )
    if lone is not None:
        raise DataError(
            f"{root} holds pictures and no subfolders; put each picture into the subfolder of its class, or add "
            f"{METADATA[0]} with the columns file_name and {LABEL}"
        )
    classes = names or tuple(folder.name for folder in folders)
    labels = {name: label for label, name in enumerate(classes)}
    pictures: list[Picture] = []
    for folder in folders:
        if folder.name not in labels:
            raise DataError(f"the subfolder {folder.name!r} is no line of --classes; add it, or remove it")
        files = sorted(pictures_below(folder))
        if not files:
            raise DataError(f"class {folder.name!r} holds no pictures: {folder}; add some, or remove the folder")
        pictures += [Picture(file=file, label=labels[folder.name]) for file in files]
    return _labeled(root, pictures, classes)


def _read_names(file: Path) -> tuple[str, ...]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or reason(error)
        raise DataError(
            f"cannot read --classes {file}: {why}; give a text file in UTF-8 with a class per line"
        ) from error
    names = tuple(line for line in lines if line)
    if not names or len(set(names)) < len(names):
        problem = "names a class twice" if names else "names no class"
        raise DataError(f"--classes {file} {problem}; write each class once, one per line")
    return names


def _with_captions(root: Path) -> PictureFolder:
    files = sorted(pictures_below(root))
    captions = read_captions(root, files)
    if missing := [file for file in files if file not in captions]:
        first, others = missing[0].relative_to(root), f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(
            f"pictures without captions in {root}: {first}{others}; add a row to {METADATA[0]} or another metadata "
            f"file, or a text file {first.with_suffix(SIDECAR)}"
        )
    return PictureFolder(root=root, pictures=tuple(Picture(file=file, caption=captions[file]) for file in files))


def _first_captions(root: Path) -> Path | None:
    """Return a file of captions; None if there is none."""
    for file in files_below(root):
        describes = file.suffix.lower() == SIDECAR and any(file.with_suffix(suffix).exists() for suffix in PICTURES)
        if file.name in METADATA or describes:
            return file
    return None


def _visible(folder: Path) -> Iterator[Path]:
    return (entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _is_picture(path: Path) -> bool:
    return is_picture_name(path) and path.is_file()
