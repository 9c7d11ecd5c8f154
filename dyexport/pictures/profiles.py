"""Embedded color profiles (ICC.1): pictures are converted to sRGB, whose values models are trained on."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageCms import ImageCmsTransform

Profile = Literal["none", "converted", "broken"]
"""Treatment of a picture's profile: there is none, the picture is converted by it, or it cannot be used."""

GRAY = frozenset({"1", "L", "LA", "I;16", "I;16L", "I;16B", "I;16N"})  # modes of Pillow
MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # of Pillow, by the color space of a profile
CACHED = 64  # transforms; most pictures share a few profiles


class _Transform(NamedTuple):
    mode: str
    to_srgb: ImageCmsTransform


def profile_of(image: Image) -> Profile:
    """Return how the profile of a picture is treated. The picture need not be decoded."""
    if not image.info.get("icc_profile"):
        return "none"
    return "broken" if _transform_of(image) is None else "converted"


def in_srgb(image: Image) -> Image:
    """Convert a picture by its profile to RGB or RGBA, with the perceptual intent; return it as it is without one.

    A profile that is broken, or of another color space than the picture, is ignored.
    """
    transform = _transform_of(image)
    if transform is None:
        return image
    converted = transform.to_srgb.apply(image.convert(transform.mode))
    if image.has_transparency_data:
        converted.putalpha(image.convert("RGBA").getchannel("A"))
    return converted


def _transform_of(image: Image) -> _Transform | None:
    profile = image.info.get("icc_profile")
    if not profile:
        return None
    transform = _transform(profile)
    if transform is None or (transform.mode == "CMYK") != (image.mode == "CMYK"):
        return None
    return None if transform.mode == "L" and image.mode not in GRAY else transform


@lru_cache(maxsize=CACHED)
def _transform(profile: bytes) -> _Transform | None:
    from PIL import ImageCms

    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = MODES.get(opened.profile.xcolor_space.strip())
        if mode is None:
            return None
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE  # its table of grays errs in the dark
        to_srgb = ImageCms.ImageCmsTransform(opened, srgb, mode, "RGB", flags=flags)
    except (OSError, ImageCms.PyCMSError):
        return None
    return _Transform(mode, to_srgb)
