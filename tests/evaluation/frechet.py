"""The Frechet distance in numpy, independent of the one under test."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def frechet_distance(left: Array, right: Array) -> float:
    """Compare Gaussians fitted to two sets of features (n, d), (m, d) (arXiv 1706.08500)."""
    means = (left.mean(axis=0), right.mean(axis=0))
    covariances = (np.cov(left, rowvar=False), np.cov(right, rowvar=False))
    return gaussian_frechet(means, covariances)


def gaussian_frechet(means: tuple[Array, Array], covariances: tuple[Array, Array]) -> float:
    """Compute |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) for means (d,) and covariances (d, d).

    The trace of that root is the nuclear norm of C1^(1/2) C2^(1/2): real, and stable where features
    are constant or outnumber the samples.
    """
    roots = [_square_root(covariance) for covariance in covariances]
    shared = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    distance = np.square(means[0] - means[1]).sum() + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * shared
    return max(float(distance), 0.0)


def _square_root(covariance: Array) -> Array:
    values, vectors = np.linalg.eigh(covariance)
    root: Array = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T  # (d, d)
    return root
