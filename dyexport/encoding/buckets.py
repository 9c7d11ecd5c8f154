"""Aspect buckets: sizes of about the same area, one of which each picture is cropped to. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

MOST_ASPECT = 2.0  # of the longer side to the shorter one
STEPS = 16  # sizes along a side of the model's own size


class Size(NamedTuple):
    """Height and width in pixels."""

    height: int
    width: int


def bucket_sizes(side: int, multiple: int) -> tuple[Size, ...]:
    """Return sizes of at most ``side`` squared pixels, in multiples of ``multiple``, from tall to wide.

    Sides are a 16th of ``side`` apart where that is possible: 64 pixels at 1024. The square is one of them.
    """
    step = max(side // STEPS // multiple, 1) * multiple
    longest = range(side, int(side * math.sqrt(MOST_ASPECT)) + 1, step)
    sizes = {Size(height, side * side // height // step * step) for height in longest}
    tall = {size for size in sizes if size.height <= MOST_ASPECT * size.width}
    return tuple(sorted(tall | {Size(size.width, size.height) for size in tall}, reverse=True))


def nearest(size: Size, buckets: Sequence[Size]) -> Size:
    """Return the bucket whose ratio of height to width is the nearest to that of a picture."""
    ratio = math.log(size.height / size.width)
    return min(buckets, key=lambda bucket: abs(math.log(bucket.height / bucket.width) - ratio))
