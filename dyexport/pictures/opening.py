"""Opening of the pictures that people have. Imports no torch."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL.Image import Transpose

from dyexport.errors import DataError, reason
from dyexport.pictures.profiles import in_srgb

if TYPE_CHECKING:
    from PIL.Image import Image

SIXTEEN_BITS = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
ORIENTATION = 0x0112  # of EXIF
UPRIGHT, QUARTER_TURNS = 1, frozenset({5, 6, 7, 8})
TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
NO_RANGE = frozenset({"I", "F"})  # 32 bits, of which black and white are not known


def open_picture(file: Path, sha256: str | None = None) -> Image:
    """Open a picture in sRGB: upright, and on white where it is transparent.

    Raises ``DataError`` for a file that cannot be decoded, and for one that has another SHA-256.
    """
    from PIL import Image

    try:
        content = file.read_bytes()
        if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
            raise DataError(f"the picture {file} changed while pictures were encoded; repeat the command")
        with Image.open(io.BytesIO(content)) as image:
            check_range(image)
            upright = in_srgb(_in_eight_bits(_turned(image)))
            if not upright.has_transparency_data:
                return upright.convert("RGB")
            over = upright.convert("RGBA")
    except DataError:
        raise
    except Exception as error:  # damaged files raise what Pillow's parsers and struct raise
        raise DataError(f"cannot read the picture {file}: {problem_of(error)}; remove it, or save it again") from error
    white = Image.new("RGBA", over.size, "white")
    white.alpha_composite(over)
    return white.convert("RGB")


def orientation_of(image: Image) -> int:
    """Return the orientation in the EXIF data of a picture that is loaded: Pillow turns TIFF files as it loads them."""
    orientation = image.getexif().get(ORIENTATION)
    return orientation if orientation in TURNS else UPRIGHT


def _turned(image: Image) -> Image:
    """Turn a picture upright.

    Pillow's ``exif_transpose`` also writes all EXIF data again, which fails where an entry is damaged.
    """
    image.load()
    orientation = orientation_of(image)
    return image if orientation == UPRIGHT else image.transpose(TURNS[orientation])


def _in_eight_bits(image: Image) -> Image:
    """Reduce a gray picture of 16 bits, which ``convert`` would clip to white."""
    from PIL.Image import fromarray

    if image.mode not in SIXTEEN_BITS:
        return image
    reduced = fromarray((np.asarray(image) >> 8).astype(np.uint8))
    reduced.info["icc_profile"] = image.info.get("icc_profile")
    return reduced


def check_range(image: Image) -> None:
    """Raise ``ValueError`` for pixels of 32 bits."""
    if image.mode in NO_RANGE:
        kind = "whole numbers" if image.mode == "I" else "floating-point numbers"
        raise ValueError(f"its pixels are {kind} of 32 bits, whose range is not known")


def problem_of(error: Exception) -> str:
    """Return why a picture cannot be opened."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "it is no picture, or is damaged"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return reason(error).removesuffix(".")
