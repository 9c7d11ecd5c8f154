"""Scores against closed forms and independent computations in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyexport.evaluation.scores import (
    as_pictures,
    frechet_distance,
    kernel_distance,
    peak_signal_to_noise,
    relative_distances,
    structural_similarity,
    window_of,
)
from tests.evaluation import frechet

pytestmark = pytest.mark.build  # importing torchmetrics takes seconds

spreads = st.lists(st.floats(0, 10), min_size=3, max_size=3)


@given(spreads, spreads, st.floats(-5, 5))
def test_the_distance_in_numpy_matches_the_closed_form(left: list[float], right: list[float], shift: float) -> None:
    means = (np.zeros(3), np.full(3, shift))
    covariances = (np.diag(np.square(left)), np.diag(np.square(right)))
    expected = 3 * shift**2 + np.square(np.subtract(left, right)).sum()
    assert frechet.gaussian_frechet(means, covariances) == pytest.approx(expected, abs=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(4, 60))
def test_frechet_distance_equals_the_one_in_numpy(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(count, 12)), rng.normal(size=(50, 12)) @ rng.normal(size=(12, 12)) + 1
    expected = frechet.frechet_distance(left, right)
    assert frechet_distance(torch.from_numpy(left), torch.from_numpy(right)) == pytest.approx(expected, rel=1e-3)


def test_a_set_has_no_distance_to_itself() -> None:
    features = torch.randn(10, 64, generator=torch.Generator().manual_seed(0)).double()
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-4)


def test_kernel_distance_equals_the_one_in_numpy() -> None:
    """A subset of all samples is the same every time, so that its mean is the estimate itself."""
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(30, 5)), rng.normal(size=(30, 5)) + 0.5
    kernel = lambda one, other: (one @ other.T / 5 + 1) ** 3  # noqa: E731
    within = sum(k.sum() - np.trace(k) for k in (kernel(left, left), kernel(right, right))) / (30 * 29)
    expected = within - 2 * kernel(left, right).mean()
    measured = kernel_distance(torch.from_numpy(left), torch.from_numpy(right), 30)
    assert measured.mean == pytest.approx(expected, rel=1e-9)
    assert measured.deviation == pytest.approx(0, abs=1e-9)


def test_kernel_distance_has_a_fixed_seed_and_leaves_torchs() -> None:
    features = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    assert kernel_distance(features, features + 1, 10) == kernel_distance(features, features + 1, 10)
    assert torch.rand(1) == expected


def pictures(side: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(side)
    left = torch.rand(3, 2, side, side, generator=generator)
    return left, (left + 0.1 * torch.randn(left.shape, generator=generator)).clamp(0, 1)


@pytest.mark.parametrize("data_range", [1.0, 8.0])
def test_psnr_equals_the_one_in_numpy(data_range: float) -> None:
    left, right = pictures(8)
    errors = np.square((left - right).double().numpy()).mean(axis=(1, 2, 3))
    measured = peak_signal_to_noise(left, right, data_range).numpy()
    assert measured == pytest.approx(10 * np.log10(data_range**2 / errors), rel=1e-6)


@pytest.mark.parametrize("side", [5, 8, 16, 32])
def test_ssim_equals_the_one_in_numpy(side: int) -> None:
    left, right = pictures(side)
    assert window_of(left) == {5: 5, 8: 7}.get(side, 11)
    expected = ssim(left.double().numpy(), right.double().numpy(), window_of(left))
    measured = structural_similarity(left, right, 1.0).numpy()
    assert measured == pytest.approx(expected, rel=1e-4)
    assert structural_similarity(left, left, 1.0).numpy() == pytest.approx(1)


def ssim(left: np.ndarray, right: np.ndarray, window: int) -> np.ndarray:
    """Structural similarity (Wang et al. 2004), with pictures continued by their reflection."""
    line = np.exp(-0.5 * np.square((np.arange(window) - window // 2) / 1.5)) if window == 11 else np.ones(window)
    weights = np.outer(line, line) / line.sum() ** 2

    def mean(values: np.ndarray) -> np.ndarray:
        margin = ((0, 0), (0, 0), (window // 2,) * 2, (window // 2,) * 2)
        values = np.pad(values, margin, mode="reflect")
        views = np.lib.stride_tricks.sliding_window_view(values, (window, window), axis=(2, 3))
        return (views * weights).sum(axis=(-1, -2))

    means = mean(left), mean(right)
    variances = mean(left**2) - means[0] ** 2, mean(right**2) - means[1] ** 2
    covariance = mean(left * right) - means[0] * means[1]
    first, second = 0.01**2, 0.03**2
    top = (2 * means[0] * means[1] + first) * (2 * covariance + second)
    bottom = (means[0] ** 2 + means[1] ** 2 + first) * (variances[0] + variances[1] + second)
    values: np.ndarray = (top / bottom).mean(axis=(1, 2, 3))
    return values


def test_relative_distances_are_over_whole_samples() -> None:
    right = torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]])
    assert relative_distances(right * 1.5, right).tolist() == [0.5, 0.5]
    assert relative_distances(right + torch.tensor([[[0.0, 1.0]]]), right).tolist() == pytest.approx([0.2, 0.5])


def test_samples_as_pictures() -> None:
    video = torch.rand(2, 3, 1, 4, 5)  # (B, F, C, H, W)
    assert torch.equal(as_pictures(video, pixels=True)[4], video[1, 1])
    latents = torch.rand(2, 4, 3, 4, 5)  # (B, C, F, H, W)
    assert torch.equal(as_pictures(latents, pixels=False)[4], latents[1, :, 1])
    packed = torch.arange(24.0).reshape(1, 8, 3)  # (B, N, C)
    assert as_pictures(packed, 0.5, pixels=False).shape == (1, 3, 2, 4)
    assert as_pictures(packed, 2.0, pixels=False)[0, 1, 3, 1] == packed[0, 7, 1]
    assert as_pictures(packed[:, :4], pixels=False).shape == (1, 3, 2, 2)
    flat = torch.rand(2, 3, 4, 5)
    assert as_pictures(flat, pixels=True) is flat
