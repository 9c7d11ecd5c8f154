"""Scores as functions of tensors: distances of feature sets, and comparisons of pairs that start from equal noise."""

from __future__ import annotations

import warnings
from math import isqrt
from typing import Any, NamedTuple

import torch

from dyexport.errors import missing_extras

SUBSETS = 100  # of the kernel distance, as published
GAUSSIAN_WINDOW = 11  # pixels on a side of the published window of SSIM
SMALL_WINDOW = 7  # of smaller pictures


class Kernel(NamedTuple):
    """Kernel distance: mean and standard deviation over subsets."""

    mean: float
    deviation: float


@missing_extras()
def check_installed() -> None:
    """Raise ``MissingDependencyError`` without torchmetrics: before samples are made, which may take hours."""
    import torchmetrics  # noqa: F401


@missing_extras()
def frechet_distance(samples: torch.Tensor, real: torch.Tensor) -> float:
    """Compare Gaussians fitted to features (n, d) and (m, d), in fp64: FID (arXiv 1706.08500)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_passthrough(samples.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(samples.double(), real=False)
    return max(float(metric.compute()), 0.0)


@missing_extras()
def kernel_distance(samples: torch.Tensor, real: torch.Tensor, subset: int) -> Kernel:
    """Compare features (n, d) and (m, d) by a cubic kernel, over subsets chosen with a fixed seed: KID (1801.01401)."""
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it keeps all features, which are small
        metric = KernelInceptionDistance(feature=_passthrough(samples.shape[1]), subsets=SUBSETS, subset_size=subset)
    metric.update(real.double(), real=True)
    metric.update(samples.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mean, deviation = metric.compute()
    return Kernel(float(mean), float(deviation))


def _passthrough(size: int) -> torch.nn.Module:
    """Make the extractor of features that are computed already."""
    module: Any = torch.nn.Identity()
    module.num_features = size
    return module


@missing_extras()
def peak_signal_to_noise(left: torch.Tensor, right: torch.Tensor, data_range: float) -> torch.Tensor:
    """Compare pairs of pictures (n, C, H, W) in decibels, infinite where a pair is equal: (n,)."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    pairs = zip(left.double(), right.double(), strict=True)
    return torch.stack([peak_signal_noise_ratio(one, other, data_range=data_range) for one, other in pairs])


@missing_extras()
def structural_similarity(left: torch.Tensor, right: torch.Tensor, data_range: float) -> torch.Tensor:
    """Compare pairs of pictures (n, C, H, W) by SSIM, 1 where a pair is equal: (n,).

    The window is Gaussian with a deviation of 1.5, as published; uniform on pictures smaller than that.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    small = window_of(left) < GAUSSIAN_WINDOW
    window = {"gaussian_kernel": False, "kernel_size": window_of(left)} if small else {}
    values: torch.Tensor = structural_similarity_index_measure(
        left.double(), right.double(), data_range=data_range, reduction="none", **window
    )
    return values


def window_of(pictures: torch.Tensor) -> int:
    """Return the side of the window of SSIM: 11, or on smaller pictures the largest odd number up to 7."""
    side = min(pictures.shape[-2:])
    if side >= GAUSSIAN_WINDOW:
        return GAUSSIAN_WINDOW
    return min(side - (side + 1) % 2, SMALL_WINDOW)


def relative_distances(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return |left - right| / |right| of each pair of a batch (n, ...), as L2 norms: (n,)."""
    left, right = left.double().flatten(1), right.double().flatten(1)  # (n, d)
    return (left - right).norm(dim=1) / right.norm(dim=1)


def as_pictures(values: torch.Tensor, aspect: float = 1.0, *, pixels: bool) -> torch.Tensor:
    """Return samples as pictures (n, C, H, W): frames of videos one by one, packed latents (B, N, C) as a grid.

    ``aspect`` is height over width of that grid. Videos are (B, F, C, H, W) in pixels and (B, C, F, H, W) in latents.
    """
    if values.ndim == 5:
        frames = values if pixels else values.movedim(2, 1)  # (B, F, C, H, W)
        return frames.flatten(0, 1)
    if values.ndim == 3:
        batch, tokens, channels = values.shape
        height = round((tokens * aspect) ** 0.5) if aspect != 1.0 else isqrt(tokens)
        return values.movedim(2, 1).reshape(batch, channels, height, tokens // height)
    return values
