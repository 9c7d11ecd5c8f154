"""The weight store: one file that all graphs of a bundle refer to."""

from __future__ import annotations

from pathlib import Path

import torch

from dyexport.progress import Progress
from dyexport.slicing.recipes import Read, materialize
from dyexport.slicing.store_layout import StoreLayout


def write_store(layout: StoreLayout, read: Read, path: Path, progress: Progress | None = None) -> None:
    """Write every owned tensor at its offset. One tensor is in memory at a time."""
    with path.open("wb") as file:
        file.truncate(layout.nbytes)
        for recipe in layout.owners:
            file.seek(layout.offsets[recipe])
            tensor = materialize(recipe, read)
            file.write(tensor.view(torch.uint8).numpy().data)
            if progress is not None:
                progress(file.tell(), layout.nbytes)
    if progress is not None:
        progress(layout.nbytes, layout.nbytes)  # the end is padded
