"""Samples of the dense and the dynamic network, from the same noise, as pictures of a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image

from dyexport.backbones import get_pipeline
from dyexport.backbones.sampling import VAE_SCALE, PromptPipeline
from dyexport.bundle.manifest import DENSE
from dyexport.bundle.reader import Bundle
from dyexport.bundle.spec import ModelSpec
from dyexport.engines.registry import engine_files
from dyexport.progress import Progress, no_progress
from dyexport.report.contents import Picture, Sample, Samples
from dyexport.report.settings import ReportSettings
from dyexport.runtime.loading import load
from dyexport.samples import sample

Array = np.ndarray

SMALL = 64  # pixels on a side; larger pictures are smoothed, and stored as JPEG from LARGE on
LARGE = 192
PATCH = 2  # latents on a side of a token of packed latents
SEED_OF_EMBEDDINGS = 0


@dataclass(frozen=True, kw_only=True)
class Call:
    """Arguments of one call of a network: those of its diffusers module."""

    t: float
    arguments: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Taken:
    """Pictures (B, C, H, W) in [0, 1] of the bundle and its dense network; False ``pixels``: false colors of latents.

    ``name`` is what the widths are, dynamic or static. ``labels`` and ``seeds`` are of each sample, ``calls`` the
    first call of the bundle at each t, in order.
    """

    slim: Array
    dense: Array | None
    pixels: bool
    name: str
    labels: tuple[str, ...]
    seeds: tuple[int, ...]
    calls: tuple[Call, ...]
    settings: dict[str, Any]


def take_samples(bundle: Bundle, settings: ReportSettings, progress: Progress = no_progress) -> Taken:
    """Sample both networks with the same conditions and seeds. Raises what ``dyexport.sample`` raises."""
    spec = bundle.manifest.model
    labels, arguments = _conditions(spec, settings)
    arguments |= {"steps": settings.steps_for(spec), "seed": [settings.seed + index for index in range(len(labels))]}
    with TemporaryDirectory(prefix="dyexport-report-") as folder:
        if arguments.pop("embed", False):
            arguments["prompt_embeds"] = _random_embeddings(spec, len(labels), Path(folder))
        runs = [False, True] if _has_dense(bundle, settings.target) else [False]
        calls: list[Call] = []
        values = []
        for index, dense in enumerate(runs):
            transformer = load(bundle.root, target=settings.target, check_hashes=False, dense=dense)
            with closing(transformer):
                if not dense:
                    _record(transformer, calls)
                taken = sample(transformer, **arguments, progress=_part(progress, index, len(runs)))
            values.append(taken.values)
    values = [value[:, 0] if value.ndim == 5 and taken.pixels else value for value in values]  # the first frame
    pictures = [value.float().cpu().numpy() for value in values] if taken.pixels else false_colors(values)
    return Taken(
        slim=pictures[0],
        dense=pictures[1] if len(pictures) > 1 else None,
        pixels=taken.pixels,
        name=bundle.manifest.widths,
        labels=tuple(labels),
        seeds=tuple(arguments["seed"]),
        calls=tuple(calls),
        settings=dict(taken.settings),
    )


def _conditions(spec: ModelSpec, settings: ReportSettings) -> tuple[list[str], dict[str, Any]]:
    """Return a name for each sample, and the arguments of ``sample`` that say what is sampled."""
    if get_pipeline(spec.backbone).takes == "labels":
        classes = settings.labels_for(spec)
        return [f"class {label}" for label in classes], {
            "labels": classes,
            "scheduler": settings.scheduler,
            "vae": settings.vae,
        }
    if settings.pipeline is not None:
        prompts = settings.prompts_for()
        return prompts, {"prompts": prompts, "pipeline": settings.pipeline, **_own_size(spec)}
    count = settings.samples or 2
    return ["random prompt embedding"] * count, {"embed": True, "vae": settings.vae, **_own_size(spec)}


def _own_size(spec: ModelSpec) -> dict[str, Any]:
    """Return the size in pixels that a model of prompts was built for; without packed latents, one frame."""
    if len(spec.latent_shape) == 2:
        side = isqrt(spec.tokens) * PATCH * VAE_SCALE
        return {"height": side, "width": side}
    return {"frames": 1} if spec.frames is not None else {}


def _random_embeddings(spec: ModelSpec, count: int, folder: Path) -> Path:
    """Write normal embeddings of prompts, and masks of ones, as ``sample`` reads them."""
    from safetensors.torch import save_file

    kind = get_pipeline(spec.backbone)
    assert isinstance(kind, PromptPipeline)
    generator = torch.Generator().manual_seed(SEED_OF_EMBEDDINGS)
    tensors = {}
    for name, shape in kind.columns(spec, guided=True).items():
        sizes = (count, *(spec.text_tokens if size is None else size for size in shape))
        mask = name.endswith("mask")
        tensors[name] = torch.ones(sizes, dtype=torch.int64) if mask else torch.randn(sizes, generator=generator)
    save_file(tensors, folder / "embeddings.safetensors")
    return folder / "embeddings.safetensors"


def _has_dense(bundle: Bundle, target: str) -> bool:
    return DENSE in bundle.engine_paths(engine_files(target))


def _part(progress: Progress, index: int, count: int) -> Progress:
    return lambda done, total: progress(index * total + done, count * total)


def _record(transformer: torch.nn.Module, calls: list[Call]) -> None:
    """Keep the arguments of the first call at each t."""

    def keep(module: Any, positional: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        t = float(torch.as_tensor(arguments["timestep"]).flatten()[0])
        if all(call.t != t for call in calls):
            copied = {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}
            calls.append(Call(t=t, arguments=copied))

    transformer.register_forward_pre_hook(keep, with_kwargs=True)


def false_colors(values: Sequence[torch.Tensor]) -> list[Array]:
    """Project latents of several models on the same three axes: (B, C, H, W), (B, C, F, H, W) or packed (B, N, C).

    The axes are the principal components of the channels of all of them. Returns pictures (B, 3, H, W) in [0, 1].
    """
    grids = [_as_grid(value.float().cpu().numpy()) for value in values]  # (B, C, H, W) each
    channels = grids[0].shape[1]
    pixels = np.concatenate([grid.transpose(0, 2, 3, 1).reshape(-1, channels) for grid in grids])  # (M, C)
    mean = pixels.mean(axis=0)
    _, _, axes = np.linalg.svd(np.cov(pixels - mean, rowvar=False).reshape(channels, channels))
    axes = axes[:3]
    low, high = np.percentile((pixels - mean) @ axes.T, (2, 98), axis=0)  # (3,) each
    pictures = []
    for grid in grids:
        projected = (grid.transpose(0, 2, 3, 1) - mean) @ axes.T  # (B, H, W, 3 or fewer)
        scaled = ((projected - low) / np.maximum(high - low, 1e-9)).clip(0, 1).transpose(0, 3, 1, 2)
        pictures.append(scaled if scaled.shape[1] == 3 else np.repeat(scaled[:, :1], 3, axis=1))
    return pictures


def _as_grid(latents: Array) -> Array:
    """Return latents as (B, C, H, W): the first frame of a video, and packed latents one pixel per token."""
    if latents.ndim == 5:
        return latents[:, :, 0]
    if latents.ndim == 3:
        rows = next(rows for rows in range(isqrt(latents.shape[1]), 0, -1) if latents.shape[1] % rows == 0)
        return latents.transpose(0, 2, 1).reshape(len(latents), latents.shape[2], rows, -1)
    return latents


def as_contents(taken: Taken) -> Samples:
    """Return samples with their captions for the page."""
    count = len(taken.labels)
    samples = tuple(
        Sample(
            label=taken.labels[index],
            seed=taken.seeds[index],
            slim=_picture(taken.slim[index], f"{taken.labels[index]}, {taken.name} network"),
            dense=None
            if taken.dense is None
            else _picture(taken.dense[index], f"{taken.labels[index]}, dense network"),
            difference=None
            if taken.dense is None or not taken.pixels
            else float(np.abs(taken.dense[index] - taken.slim[index]).mean()),
        )
        for index in range(count)
    )
    return Samples(samples=samples, name=taken.name, caption=_caption(taken), small=taken.slim.shape[-1] <= SMALL)


def _caption(taken: Taken) -> str:
    guidance = taken.settings.get("guidance")
    how = f"{taken.settings['steps']} steps" + ("" if guidance is None else f", guidance {guidance:g}")
    pairs = (
        "The two networks start from the same noise" if taken.dense is not None else "The bundle has no dense network"
    )
    colors = (
        ""
        if taken.pixels
        else " These are latents in false color: their three principal components as red, green and blue. "
        "No autoencoder was given to decode them."
    )
    frame = " One frame is sampled, not a video." if taken.settings.get("frames") == 1 else ""
    return f"{pairs}; {how}.{frame}{colors}"


def _picture(pixels: Array, alt: str) -> Picture:
    return Picture(uri=data_uri(pixels), alt=alt)


def data_uri(pixels: Array) -> str:
    """Encode a picture (C, H, W) in [0, 1], C being 1 or 3: PNG, or JPEG if it is large."""
    values = np.rint(pixels.clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)  # (H, W, C)
    image = Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values)
    kind, options = ("JPEG", {"quality": 90}) if max(image.size) >= LARGE else ("PNG", {})
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
