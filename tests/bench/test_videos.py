"""Videos in files that others can play."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from dyexport.bench.videos import check_video_path, save_video
from dyexport.errors import MissingDependencyError, UsageError


def videos() -> np.ndarray:
    """Two videos of five frames, 16 x 32: one goes from black to white, the other from white to black."""
    rising = np.broadcast_to(np.linspace(0, 1, 5)[:, None, None, None], (5, 3, 16, 32))
    return np.stack([rising, 1 - rising])


def test_a_gif_shows_videos_beside_each_other(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.gif"
    save_video(videos(), path)
    with Image.open(path) as film:
        assert (film.n_frames, film.info["duration"], film.info["loop"]) == (5, 120, 0)  # GIF counts in hundredths
        frames = [np.asarray(frame.convert("L")) for frame in ImageSequence.Iterator(film)]
    assert frames[0].shape == (4 * (16 + 4), 4 * (2 * 32 + 6))  # four times as large, with gaps
    left, right = ([int(frame[40, column]) for frame in frames] for column in (70, 200))
    assert left == pytest.approx([0, 64, 128, 191, 255], abs=3)
    assert right == left[::-1]
    assert [each.name for each in path.parent.iterdir()] == ["a.gif"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a video goes into \.gif or \.mp4"):
        check_video_path(tmp_path / "a.png")


@pytest.mark.skipif(find_spec("imageio") is not None, reason="the encoder is installed")
def test_a_missing_encoder_names_the_extra(tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match=r"dyexport\[video\]"):
        save_video(videos(), tmp_path / "a.mp4")


def test_an_mp4_has_all_frames(tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    import imageio

    save_video(videos(), tmp_path / "a.mp4")
    frames = np.stack(imageio.mimread(tmp_path / "a.mp4"))
    assert frames.shape == (5, 80, 280, 3)
    assert frames[0, 40, 70].max() < 20
    assert frames[-1, 40, 70].min() > 235
