"""Emoji of three vendors, 32 x 32 pixels in color: the data set of the emoji models."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zipfile import BadZipFile

import numpy as np

from dyexport.digits import Split
from dyexport.emoji_packages import INDEX, Package, read_packages
from dyexport.errors import DataError, reason
from dyexport.files import replacing, user_cache

if TYPE_CHECKING:
    from dyexport.backbones.base import Preset
    from dyexport.bundle.spec import ModelSpec

Array = np.ndarray

SIZE = 32
SHAPE = (3, SIZE, SIZE)
CLASSES = ("faces", "people", "hands", "animals", "food and plants", "places", "objects", "symbols", "flags")
STORE = "emoji-32-v1.npz"  # in the user's cache; a change of the pictures needs a new name
HELD_OUT_SHARE = 0.2  # of the emoji, not of the pictures
QUOTA: Mapping[Split, int] = {"train": 600, "held-out": 75}  # pictures of each class

CATEGORIES = {
    "Smileys & Emotion": "faces",
    "People & Body": "people",
    "Animals & Nature": "animals",
    "Food & Drink": "food and plants",
    "Travel & Places": "places",
    "Activities": "objects",
    "Objects": "objects",
    "Symbols": "symbols",
    "Flags": "flags",
}
"""Classes by Unicode's categories."""

SUBCATEGORIES = {"hand": "hands", "body": "hands", "plant": "food and plants"}
"""Classes by the first word of Unicode's subcategories, where they differ from the category's."""

SKIN_TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")
PERSONS = ("1F468", "1F469", "1F9D1")  # man, woman, adult
VARIANTS = {"200D", "FE0F", "2640", "2642", "27A1", *SKIN_TONES}  # joiners, gender, direction, skin tone


@dataclass(frozen=True)
class Emoji:
    """Pictures (n, 3, 32, 32) with values in [0, 1], and their classes (n,), indices of ``CLASSES``."""

    pictures: Array
    labels: Array


class _Picture(NamedTuple):
    """One picture, before it is scaled."""

    label: int
    group: str  # emoji that differ in gender, direction or skin tone share a group
    pixels: Array  # (3, 32, 32), uint8


def samples_emoji(model: Preset | ModelSpec) -> bool:
    """Return whether the samples of a model are pictures of this size and these classes."""
    return model.pixel_space and model.latent_shape == SHAPE and model.classes == len(CLASSES)


def load_emoji(split: Split) -> Emoji:
    """Return one part of the pictures, with as many of every class.

    The first use downloads three npm packages and stores the pictures in the user's cache. Emoji are split 80/20 in a
    fixed way, all pictures of an emoji and of its variants on one side. Raises ``DataError``.
    """
    stored = _stored(user_cache() / STORE)
    pictures = stored[f"{split} pictures"].astype(np.float32) / 255  # (n, 3, 32, 32)
    return Emoji(pictures, stored[f"{split} labels"].astype(np.int64))


@cache
def _stored(path: Path) -> Mapping[str, Array]:
    """Read the arrays of both parts; make them first if the file is not there."""
    if not path.exists():
        arrays = _arrays()
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)
    try:
        with np.load(path) as stored:
            return dict(stored)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise DataError(f"cannot read {path}: {reason(error)}; delete it, and it is made again") from error


def _arrays() -> dict[str, Any]:
    pictures = list(_pictures())
    arrays: dict[str, Any] = {}
    for split, quota in QUOTA.items():
        chosen = [_chosen(pictures, label, split, quota) for label in range(len(CLASSES))]
        arrays[f"{split} pictures"] = np.concatenate(chosen)
        arrays[f"{split} labels"] = np.repeat(np.arange(len(CLASSES), dtype=np.uint8), [len(part) for part in chosen])
    return arrays


def _chosen(pictures: Sequence[_Picture], label: int, split: Split, quota: int) -> Array:
    """Return a class's pictures of one part (quota, 3, 32, 32); mirrored ones fill what lacks in training pictures."""
    mine = [picture for picture in pictures if picture.label == label]
    random = np.random.default_rng(label)
    groups = random.permutation(sorted({picture.group for picture in mine}))
    held_out = set(groups[: max(round(HELD_OUT_SHARE * len(groups)), 1)])
    part = [picture.pixels for picture in mine if (picture.group in held_out) == (split == "held-out")]
    if not part:
        raise DataError(f"the emoji packages hold no {split} pictures of {CLASSES[label]}; install them again")
    part = [part[index] for index in random.permutation(len(part))]
    if split == "train":
        part += [pixels[..., ::-1] for pixels in part]
    return np.stack(part[:quota])


def _pictures() -> Iterator[_Picture]:
    """Yield the pictures of all packages, in the order of the packages and of their emoji."""
    emoji: list[dict[str, Any]] = []
    for package, files in read_packages():
        if INDEX in files:
            emoji = json.loads(files[INDEX])
        for entry in emoji:
            if (name := class_of(entry)) is None or (name == "flags" and not package.flags):
                continue
            for image in _images(entry, toned=name == "hands"):
                if (content := files.get(_path(package, image))) is not None:
                    yield _Picture(CLASSES.index(name), group_of(entry["unified"]), _pixels(content))


def class_of(entry: Mapping[str, Any]) -> str | None:
    """Return the class of an emoji, None for a mere skin tone."""
    word = entry["subcategory"].split("-")[0].rstrip("s")
    return SUBCATEGORIES.get(word) or CATEGORIES.get(entry["category"])


def group_of(unified: str) -> str:
    """Return the code points that an emoji shares with its variants of gender, direction and skin tone."""
    kept = [code for code in unified.split("-") if code not in VARIANTS]
    rest = [code for code in kept if code not in PERSONS]
    return "-".join(rest) or PERSONS[0]


def _images(entry: Mapping[str, Any], *, toned: bool) -> Iterator[str]:
    """Yield the file names of an emoji and of its skin tones, which few classes need."""
    yield entry["image"]
    for tone, variant in entry.get("skin_variations", {}).items() if toned else ():
        if tone in SKIN_TONES:
            yield variant["image"]


def _path(package: Package, image: str) -> str:
    return package.pictures.format(image.removesuffix(".png"))


def _pixels(content: bytes) -> Array:
    """Decode a picture, put it on white and average it down: (3, 32, 32), uint8."""
    from PIL import Image

    picture = Image.open(BytesIO(content)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    small = white.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(small).transpose(2, 0, 1)
