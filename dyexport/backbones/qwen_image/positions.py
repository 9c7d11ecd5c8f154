"""Positions of image and text tokens for the rotary embedding: diffusers' ``QwenEmbedRope`` as numbers.

Rows and columns are counted from the center of a picture, and text goes on where the larger side ends, on all
three axes alike. A reference picture that an editing pipeline appends counts as one more frame.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, int, int]
"""Frames, rows and columns of the tokens of one picture: an entry of ``img_shapes``."""


class Positions(NamedTuple):
    """Positions of image tokens (N, 3) and of text tokens (T, 3), float32."""

    image: Tensor
    text: Tensor


@lru_cache(maxsize=16)
def token_positions(shapes: tuple[Shape, ...], words: int, device: torch.device) -> Positions:
    """Return the positions for pictures of these shapes, one after another, and ``words`` text tokens."""
    images = [_grid(index, shape) for index, shape in enumerate(shapes)]
    start = max(max(rows // 2, columns // 2) for _, rows, columns in shapes)
    text = (start + torch.arange(words)).float().unsqueeze(1).expand(-1, 3)  # (T, 3)
    return Positions(torch.cat(images).to(device), text.contiguous().to(device))


def _grid(first: int, shape: Shape) -> Tensor:
    """Return the positions of one picture: (frames * rows * columns, 3)."""
    frames, rows, columns = shape
    axes = (
        first + torch.arange(frames),
        torch.arange(rows) - (rows - rows // 2),
        torch.arange(columns) - (columns - columns // 2),
    )
    return torch.cartesian_prod(*axes).float()


def shapes_of(image: Tensor) -> list[Shape]:
    """Return the shapes that image positions (N, 3) were made from, each frame as a picture."""
    _, counts = image[:, 0].unique_consecutive(return_counts=True)
    shapes = []
    for frame in image[:, 1:].split(counts.tolist()):
        rows, columns = (frame.amax(0) - frame.amin(0) + 1).int().tolist()
        shapes.append((1, rows, columns))
    return shapes


def first_shapes(img_shapes: Any) -> tuple[Shape, ...]:
    """Return the shapes of a batch's first sample from the stock module's argument: one picture, or several."""
    first = img_shapes[0]
    pictures = [first] if isinstance(first[0], int) else first
    return tuple((int(frames), int(rows), int(columns)) for frames, rows, columns in pictures)
