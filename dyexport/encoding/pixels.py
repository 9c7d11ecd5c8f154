"""Pictures to pixels: resized, cropped and mirrored."""

from __future__ import annotations

from functools import cache
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dyexport.encoding.buckets import Size
from dyexport.pictures.opening import open_picture

if TYPE_CHECKING:
    from PIL.Image import Image

KEPT = 2  # times the part that is cropped


def read_pixels(
    file: Path, size: Size, *, mirrored: bool = False, grayscale: bool = False, sha256: str | None = None
) -> Tensor:
    """Read a picture to pixels (C, height, width) in [-1, 1].

    The shorter side is resized to fit and the center is cropped, as diffusers' ``VaeImageProcessor`` does in mode
    ``crop``. Raises ``DataError`` naming a file that cannot be decoded, or whose SHA-256 is another one.
    """
    processor, opened = _processor(grayscale), without_ends(open_picture(file, sha256), size)
    pixels: Tensor = processor.preprocess(opened, height=size.height, width=size.width, resize_mode="crop")[0]
    return pixels.flip(-1) if mirrored else pixels


def without_ends(image: Image, size: Size) -> Image:
    """Crop the ends of a picture that is much longer than ``size``: resized as a whole it can take gigabytes."""
    scale = max(size.height / image.height, size.width / image.width)
    height = min(image.height, ceil(KEPT * size.height / scale))
    width = min(image.width, ceil(KEPT * size.width / scale))
    top, left = (image.height - height) // 2, (image.width - width) // 2
    return image.crop((left, top, left + width, top + height))


@cache
def _processor(grayscale: bool) -> Any:
    from diffusers.image_processor import VaeImageProcessor

    return VaeImageProcessor(vae_scale_factor=1, do_convert_grayscale=grayscale)
