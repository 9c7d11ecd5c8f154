"""Pictures to pixels: opened, resized, cropped and mirrored."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dyexport.errors import DataError, reason

if TYPE_CHECKING:
    from PIL.Image import Image


def read_pixels(pictures: Sequence[tuple[Path, bool]], height: int, width: int, *, grayscale: bool = False) -> Tensor:
    """Read pictures, some of them mirrored, to pixels (B, C, height, width) in [-1, 1].

    The shorter side is resized to fit and the center is cropped, as diffusers' ``VaeImageProcessor`` does in mode
    ``crop``. Raises ``DataError`` naming a file that cannot be decoded.
    """
    opened = [open_picture(file) for file, _ in pictures]
    pixels = _processor(grayscale).preprocess(opened, height=height, width=width, resize_mode="crop")
    return torch.stack([one.flip(-1) if mirrored else one for one, (_, mirrored) in zip(pixels, pictures, strict=True)])


def open_picture(file: Path) -> Image:
    """Open a picture in RGB: upright, and on white where it is transparent. Raises ``DataError``."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            upright = ImageOps.exif_transpose(image)
            if not upright.has_transparency_data:
                return upright.convert("RGB")
            over = upright.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the picture {file}: {reason(error)}; remove it, or save it again") from error
    white = Image.new("RGBA", over.size, "white")
    white.alpha_composite(over)
    return white.convert("RGB")


@cache
def _processor(grayscale: bool) -> Any:
    from diffusers.image_processor import VaeImageProcessor

    return VaeImageProcessor(vae_scale_factor=1, do_convert_grayscale=grayscale)
