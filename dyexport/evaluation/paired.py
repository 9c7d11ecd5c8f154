"""Comparison of two models that start from equal noise: their samples, and the latents along the way."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dyexport.evaluation.report import Drift, PairedScores
from dyexport.evaluation.samplers import Rows
from dyexport.evaluation.scores import (
    as_pictures,
    peak_signal_to_noise,
    relative_distances,
    structural_similarity,
    window_of,
)
from dyexport.runtime.sampling import Observer

KEPT = 64  # samples whose pictures and latents are kept for comparison, at most


@dataclass
class Trail:
    """The first samples of a model, and their latents after each step."""

    rows: list[Rows] = field(default_factory=list)
    steps: list[list[torch.Tensor]] = field(default_factory=list)  # by batch and step, (B, ...)

    @property
    def full(self) -> bool:
        return sum(len(rows.values) for rows in self.rows) >= KEPT

    def next(self) -> Observer:
        """Return the observer of the next batch, which keeps its latents after each step."""
        steps: list[torch.Tensor] = []
        self.steps.append(steps)
        return lambda latents: steps.append(latents.detach().float().cpu())

    @property
    def pixels(self) -> bool:
        return self.rows[0].pixels

    def samples(self) -> torch.Tensor:
        """Return the samples that are compared (n, ...)."""
        return torch.cat([rows.values.cpu() for rows in self.rows])[:KEPT]

    def latents(self) -> list[torch.Tensor]:
        """Return the latents after each step (n, ...)."""
        return [torch.cat(batches)[:KEPT] for batches in zip(*self.steps, strict=True)]


def compare_samples(dynamic: Trail, dense: Trail, aspect: float = 1.0) -> PairedScores:
    """Compare the samples of two models pair by pair; ``aspect`` is the height of packed latents over their width."""
    unit = dense.pixels
    left, right = (as_pictures(trail.samples(), aspect, pixels=unit) for trail in (dynamic, dense))  # (n, C, H, W)
    data_range = 1.0 if unit else float(right.max() - right.min())
    window = window_of(right)
    differ = (left != right).flatten(1).any(dim=1)  # (n,)
    left, right = left[differ], right[differ]
    psnr = peak_signal_to_noise(left, right, data_range) if len(left) else None
    ssim = structural_similarity(left, right, data_range) if len(left) and window > 1 else None
    return PairedScores(
        unit="pixels" if unit else "latents",
        pairs=len(differ),
        equal=int((~differ).sum()),
        psnr=None if psnr is None else float(psnr.mean()),
        psnr_lowest=None if psnr is None else float(psnr.min()),
        ssim=None if ssim is None else float(ssim.mean()),
        ssim_lowest=None if ssim is None else float(ssim.min()),
        ssim_window=window,
        data_range=data_range,
    )


def compare_latents(dynamic: Trail, dense: Trail) -> Drift:
    """Compare the latents of two models after each step."""
    pairs = zip(dynamic.latents(), dense.latents(), strict=True)
    distances = torch.stack([relative_distances(left, right) for left, right in pairs])  # (steps, n)
    return Drift(
        samples=distances.shape[1],
        mean=tuple(distances.mean(dim=1).tolist()),
        largest=tuple(distances.amax(dim=1).tolist()),
    )
