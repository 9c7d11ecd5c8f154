"""Videos as files: GIF, or MP4 where its encoder is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from dyexport.bench.pictures import COLUMNS, grid, zoom_for
from dyexport.errors import MissingDependencyError, UsageError
from dyexport.files import replacing

FPS = 8  # as text-to-video models are published with
SUFFIXES = (".gif", ".mp4")


def check_video_path(path: Path) -> None:
    """Raises ``UsageError`` for a file type that no video goes into, ``MissingDependencyError`` without an encoder."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"-o is {path}; a video goes into {' or '.join(SUFFIXES)}")
    if path.suffix.lower() == ".mp4":
        for module, library in (("imageio", "imageio"), ("imageio_ffmpeg", "imageio-ffmpeg")):
            if find_spec(module) is None:
                raise MissingDependencyError(library, "video")


def save_video(videos: np.ndarray, path: Path) -> None:
    """Write videos (B, F, C, H, W) with values in [0, 1] beside each other, by the suffix of ``path``."""
    check_video_path(path)
    columns, zoom = min(len(videos), COLUMNS), zoom_for(videos.shape[-2])
    frames = [grid(videos[:, frame], columns, zoom=zoom) for frame in range(videos.shape[1])]
    with replacing(path) as partial:
        if path.suffix.lower() == ".gif":
            _write_gif(frames, partial)
        else:
            _write_mp4(frames, partial)


def _write_gif(frames: list[Image.Image], path: Path) -> None:
    first, *rest = frames
    first.save(path, format="GIF", save_all=True, append_images=rest, duration=1000 // FPS, loop=0)


def _write_mp4(frames: list[Image.Image], path: Path) -> None:
    from diffusers.utils import export_to_video

    export_to_video(frames, str(path), fps=FPS, macro_block_size=2)  # sides are even, as players ask for
