"""Write videos as GIF, or as MP4 if its encoder is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from dyexport.bench.pictures import COLUMNS, grid, zoom_for
from dyexport.errors import MissingDependencyError, UsageError
from dyexport.files import replacing

FPS = 8  # as text-to-video models are published with
SUFFIXES = (".gif", ".mp4")


def check_video_path(path: Path) -> None:
    """Raise ``UsageError`` for an unknown file type, ``MissingDependencyError`` without an encoder."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"-o is {path}; a video goes into {' or '.join(SUFFIXES)}")
    if path.suffix.lower() == ".mp4":
        for module, library in (("imageio", "imageio"), ("imageio_ffmpeg", "imageio-ffmpeg")):
            if find_spec(module) is None:
                raise MissingDependencyError(library, "video")


def save_video(videos: np.ndarray, path: Path) -> None:
    """Write videos (B, F, C, H, W) with values in [0, 1] next to each other; the suffix of ``path`` is the format."""
    from diffusers.utils import export_to_gif, export_to_video

    check_video_path(path)
    columns, zoom = min(len(videos), COLUMNS), zoom_for(videos.shape[-2])
    frames = [grid(videos[:, frame], columns, zoom=zoom) for frame in range(videos.shape[1])]
    with replacing(path) as partial:
        if path.suffix.lower() == ".gif":
            export_to_gif(frames, str(partial), fps=FPS)
        else:
            export_to_video(frames, str(partial), fps=FPS, macro_block_size=2)  # players expect even sides
