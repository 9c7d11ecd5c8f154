"""The token map of a page: skipped tokens colored over a sampled picture."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import numpy as np
from PIL import Image

from dyexport.bundle.spec import ModelSpec
from dyexport.report.contents import Picture, TokenCell, TokenMap
from dyexport.report.pictures import Call, Taken, data_uri
from dyexport.report.token_masks import StepTokens

STEPS = 4  # rows of the map
BLOCKS = 6  # columns of the map, at most
THUMBNAIL = 128  # pixels


def chosen_calls(calls: Sequence[Call]) -> list[Call]:
    """Return calls that are spread over the trajectory, the first and the last among them."""
    places = dict.fromkeys(np.linspace(0, len(calls) - 1, min(STEPS, len(calls))).round().astype(int).tolist())
    return [calls[place] for place in places]


def token_map_of(spec: ModelSpec, taken: Taken, steps: Sequence[StepTokens]) -> TokenMap | None:
    """Lay tokens over the first sample; None if they are not on a grid of rows and columns."""
    grid = token_grid(spec, next(iter(steps[0].kept.values())).size)
    if grid is None:
        return None
    blocks = [*steps[0].kept]
    blocks = [blocks[place] for place in np.linspace(0, len(blocks) - 1, min(BLOCKS, len(blocks))).round().astype(int)]
    rows = tuple((f"t = {step.t:.3g}", tuple(_cell(step, block, grid) for block in blocks)) for step in steps)
    return TokenMap(
        picture=Picture(uri=data_uri(_thumbnail(taken.slim[0])), alt=f"{taken.labels[0]}, {taken.name} network"),
        rows=grid[0],
        columns=grid[1],
        steps=rows,
        caption="Orange squares are tokens whose MLP was skipped, from noise (top) to data (bottom), over the finished "
        f"picture of {taken.labels[0]}, seed {taken.seeds[0]}. Read from the ONNX graphs while they ran.",
    )


def token_grid(spec: ModelSpec, tokens: int) -> tuple[int, int] | None:
    """Return rows and columns of the tokens of a picture; None if a packed picture is not square."""
    if len(spec.latent_shape) == 3:
        _, height, width = spec.latent_shape
        patch = isqrt(height * width // tokens)
        return height // patch, width // patch
    side = isqrt(tokens)
    return (side, side) if side * side == tokens else None


def _cell(step: StepTokens, block: int, grid: tuple[int, int]) -> TokenCell:
    kept = step.kept[block].reshape(grid)
    squares = [f"M{x} {y}h1v1h-1z" for y, x in zip(*np.nonzero(~kept), strict=True)]
    return TokenCell(block=block, kept=float(kept.mean()), skipped="".join(squares))


def _thumbnail(picture: np.ndarray) -> np.ndarray:
    """Return a picture (C, H, W) of ``THUMBNAIL`` pixels at most."""
    if max(picture.shape[1:]) <= THUMBNAIL:
        return picture
    image = Image.fromarray(np.rint(picture.clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0).squeeze())
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1) / 255
