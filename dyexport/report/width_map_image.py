"""The width map as a picture, made with Pillow alone: ``inspect --png`` needs no extra."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from dyexport.report.width_map import Array, WidthMap, color

CELL, MARGIN, LINE = 12, 48, 16  # pixels
POINTS = 96  # cells of t


def render_image(widths: WidthMap) -> Image.Image:
    """Render heat maps as a picture, one panel per map, with a white line where the engine changes."""
    panel = LINE + widths.depth * CELL + LINE // 2
    size = (MARGIN + len(widths.timesteps) * CELL + CELL, len(widths.maps) * panel + 2 * LINE)
    image = Image.new("RGB", size, "white")
    canvas = ImageDraw.Draw(image)
    for index, heat_map in enumerate(widths.maps):
        top = index * panel + LINE
        canvas.text((MARGIN, top - LINE + 2), heat_map.caption, fill="black")
        image.paste(colored(heat_map.values, CELL), (MARGIN, top))
        for block in range(0, widths.depth, max(widths.depth // 8, 1)):
            canvas.text((4, top + block * CELL), f"block {block}", fill="black", font_size=9)
        for place in widths.boundaries:
            x = MARGIN + place * CELL
            canvas.line([(x, top), (x, top + widths.depth * CELL - 1)], fill="white", width=2)
    legend = f"{widths.axis}; dark is off, yellow is on, a white line is the next engine"
    canvas.text((MARGIN, len(widths.maps) * panel + LINE // 2), legend, fill="black")
    return image


def colored(values: Array, cell: int) -> Image.Image:
    """Return shares (L, P) as squares of ``cell`` pixels."""
    pixels = np.array([[color(value) for value in row] for row in values], dtype=np.uint8)  # (L, P, 3)
    return Image.fromarray(pixels).resize((pixels.shape[1] * cell, pixels.shape[0] * cell), Image.Resampling.NEAREST)
