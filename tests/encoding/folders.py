"""Folders of small pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from dyexport.encoding.encode import Encoded, Encoding
from dyexport.encoding.settings import EncodeSettings


def picture(file: Path, seed: int = 0, width: int = 40, height: int = 24) -> Path:
    """Save a picture of random pixels."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def class_folder(root: Path, count: int = 3, classes: tuple[str, ...] = ("cats", "dogs")) -> Path:
    """Make a folder with ``count`` pictures of each class."""
    for label, name in enumerate(classes):
        for number in range(count):
            picture(root / name / f"{number}.png", seed=label * count + number)
    return root


def encode(settings: EncodeSettings, out: Path, index: Path | None = None) -> Encoded:
    """Encode without reporting progress."""
    encoding = Encoding(settings)
    out.mkdir(parents=True, exist_ok=True)
    samples = encoding.samples(index or out / "pictures.jsonl", lambda *_: None)
    return encoding.write(samples, out, lambda *_: None)
