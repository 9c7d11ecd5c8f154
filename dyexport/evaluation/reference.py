"""The reference of distances: features of real pictures, from a folder, a file or a built-in data set."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from dyexport.errors import DataError, reason
from dyexport.evaluation.data_sets import DATA_SETS
from dyexport.evaluation.extractors.base import FeatureExtractor
from dyexport.pictures.opening import open_picture
from dyexport.progress import Progress, no_progress

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FILES = (".safetensors", ".npz")
BATCH = 64
KEYS = ("features", "latents", "pictures", "arr_0")
"""Contents that a file may have: features (n, d), latents (n, ...), or pictures (n, H, W, C) in eight bits, in files of
guided-diffusion under ``arr_0``."""

Decoder = Callable[[torch.Tensor], torch.Tensor]


class Reference(NamedTuple):
    """Features of real data (n, d), and how many pictures were resized to the size of the samples."""

    features: torch.Tensor
    resized: int = 0


def read_reference(
    source: str,
    extractor: FeatureExtractor,
    shape: tuple[int, ...],
    *,
    decode: Decoder | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = no_progress,
) -> Reference:
    """Read a reference and compute its features.

    ``shape`` (C, H, W) is that of the samples, to which pictures are resized: the shorter side, then cropped.
    ``decode`` makes pictures of latents. Raises ``DataError`` for what cannot be read, or does not fit.
    """
    if source in DATA_SETS:
        pictures = torch.from_numpy(DATA_SETS[source].load("train").pictures)  # (n, C, H, W)
        return Reference(extractor(pictures))
    path = Path(source)
    if path.is_dir():
        return _read_folder(path, extractor, shape, device, progress)
    kind, values = _read_file(path)
    if kind == "features":
        return Reference(values.flatten(1).double())
    if kind == "latents":
        return Reference(_of_latents(path, values, extractor, shape, decode, device, progress))
    images = (_image(value) for value in values.numpy())
    return _features(images, len(values), extractor, shape, device, progress)


def picture_files(folder: Path) -> list[Path]:
    """List the pictures in a folder and below, by name. Raises ``DataError`` for fewer than two."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES and path.is_file())
    if len(files) < 2:
        raise DataError(
            f"--real {folder} holds {len(files)} pictures ({', '.join(PICTURES)}); a distance needs at least 2"
        )
    return files


def _read_folder(
    folder: Path, extractor: FeatureExtractor, shape: tuple[int, ...], device: Any, progress: Progress
) -> Reference:
    files = picture_files(folder)
    return _features((open_picture(file) for file in files), len(files), extractor, shape, device, progress)


def _image(value: np.ndarray) -> Image.Image:
    return Image.fromarray(value.squeeze(-1) if value.shape[-1] == 1 else value).convert("RGB")


def _features(
    images: Iterator[Image.Image],
    count: int,
    extractor: FeatureExtractor,
    shape: tuple[int, ...],
    device: Any,
    progress: Progress,
) -> Reference:
    """Compute features of pictures a batch at a time."""
    mode, size = "L" if shape[0] == 1 else "RGB", (shape[2], shape[1])
    features, batch, resized = [], [], 0
    for index, image in enumerate(images, start=1):
        resized += image.size != size
        fitted = image if image.size == size else ImageOps.fit(image, size, Image.Resampling.LANCZOS)
        batch.append(np.atleast_3d(np.asarray(fitted.convert(mode))))  # (H, W, C)
        if len(batch) == BATCH or index == count:
            pictures = torch.from_numpy(np.stack(batch)).movedim(-1, 1).to(device).float() / 255  # (B, C, H, W)
            features.append(extractor(pictures).cpu())
            batch.clear()
            progress(index, count)
    return Reference(torch.cat(features), resized)


def _of_latents(
    path: Path,
    values: torch.Tensor,
    extractor: FeatureExtractor,
    shape: tuple[int, ...],
    decode: Decoder | None,
    device: Any,
    progress: Progress,
) -> torch.Tensor:
    """Compute features of latents (n, C, H, W): of their pictures where there is a VAE."""
    if decode is None and tuple(values.shape[1:]) != shape:
        raise DataError(f"--real {path} holds latents {list(values.shape[1:])}, and samples are {list(shape)}")
    features = []
    for start in range(0, len(values), BATCH):
        latents = values[start : start + BATCH].to(device).float()  # (B, C, H, W)
        features.append(extractor(latents if decode is None else decode(latents)).cpu())
        progress(min(start + BATCH, len(values)), len(values))
    return torch.cat(features)


def _read_file(path: Path) -> tuple[str, torch.Tensor]:
    """Read the first known tensor of a file. Raises ``DataError``."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored: dict[str, Any] = {}
        if path.suffix == ".safetensors":
            stored = dict(load_file(path))
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                stored = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name in KEYS}
        else:
            raise DataError(f"--real is {path}; give a folder of pictures, or a file: {' or '.join(FILES)}")
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read {path}: {reason(error)}; give a file of {' or '.join(KEYS[:3])}") from error
    kind = next((name for name in KEYS if name in stored), None)
    if kind is None:
        raise DataError(f"{path} holds none of {', '.join(KEYS)}; name its tensor features, latents or pictures")
    return kind, _checked(path, kind, stored[kind])


def _checked(path: Path, kind: str, values: torch.Tensor) -> torch.Tensor:
    pictures = kind in ("pictures", "arr_0")
    if len(values) < 2 or (kind == "features" and values.ndim != 2):
        raise DataError(f"{path} holds {kind} of shape {list(values.shape)}; at least 2 rows are needed")
    if pictures and (values.dtype != torch.uint8 or values.ndim != 4 or values.shape[-1] not in (1, 3)):
        raise DataError(f"{path} holds {kind} of shape {list(values.shape)}; pictures are (n, H, W, 1 or 3) in uint8")
    if not pictures and not bool(values.isfinite().all()):
        raise DataError(f"{path} holds {kind} that are not finite; compute them again")
    return values
