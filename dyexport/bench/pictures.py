"""Write pictures: grids of samples, and models side by side."""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from dyexport.files import replacing

if TYPE_CHECKING:
    import torch

Array = np.ndarray

GAP, HEADER = 2, 16  # pixels
COLUMNS = 10  # pictures in a row


def grid(pictures: Array, columns: int, *, zoom: int = 1) -> Image.Image:
    """Tile pictures (n, C, H, W) with values in [0, 1], C being 1 or 3; ``zoom`` enlarges each pixel."""
    count, _, height, width = pictures.shape
    rows = ceil(count / columns)
    sheet = np.ones((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3))  # (Y, X, 3), white
    for index, picture in enumerate(pictures):
        top = GAP + index // columns * (height + GAP)
        left = GAP + index % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = np.broadcast_to(picture.transpose(1, 2, 0), (height, width, 3))
    pixels = np.rint(sheet.clip(0, 1) * 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)


def side_by_side(images: dict[str, Image.Image]) -> Image.Image:
    """Place images next to each other, each under its name."""
    space = 4 * GAP
    width = sum(image.width for image in images.values()) + space * (len(images) - 1)
    sheet = Image.new("RGB", (width, HEADER + max(image.height for image in images.values())), "white")
    canvas, left = ImageDraw.Draw(sheet), 0
    for name, image in images.items():
        canvas.text((left + GAP, GAP), name, fill="black")
        sheet.paste(image, (left, HEADER))
        left += image.width + space
    return sheet


def zoom_for(height: int) -> int:
    """Return the factor by which to enlarge pictures of this height to about 64 pixels; at least 1."""
    return max(64 // height, 1)


def save_sample(samples: torch.Tensor, path: Path, *, pixels: bool) -> None:
    """Write pixels (B, C, H, W) as a picture, or latents as safetensors."""
    if pixels:
        save_png(grid(samples.cpu().numpy(), min(len(samples), COLUMNS), zoom=zoom_for(samples.shape[-2])), path)
        return
    from safetensors.torch import save_file

    with replacing(path) as partial:
        save_file({"latents": samples.contiguous().cpu()}, partial)


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG file atomically."""
    with replacing(path) as partial:
        image.save(partial, format="PNG")
