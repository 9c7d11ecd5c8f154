"""Frechet distance against closed forms, and a judge that can tell good digits from bad ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dyexport.bench.quality import Evaluator, frechet_distance, gaussian_frechet
from dyexport.digits import Digits
from dyexport.training.data import digits

spreads = st.lists(st.floats(0, 10), min_size=3, max_size=3)


@given(spreads, spreads, st.floats(-5, 5))
def test_diagonal_gaussians_match_the_closed_form(left: list[float], right: list[float], shift: float) -> None:
    means = (np.zeros(3), np.full(3, shift))
    covariances = (np.diag(np.square(left)), np.diag(np.square(right)))
    expected = 3 * shift**2 + np.square(np.subtract(left, right)).sum()
    assert gaussian_frechet(means, covariances) == pytest.approx(expected, abs=1e-5)


@given(st.integers(0, 2**32 - 1))
def test_distance_is_symmetric_and_blind_to_rotation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(40, 5)), rng.normal(size=(50, 5)) @ rng.normal(size=(5, 5)) + 1
    rotation = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    distance = frechet_distance(left, right)
    assert frechet_distance(right, left) == pytest.approx(distance, rel=1e-6)
    assert frechet_distance(left @ rotation, right @ rotation) == pytest.approx(distance, rel=1e-6)
    assert distance > 0


def test_fewer_samples_than_features_is_finite() -> None:
    rng = np.random.default_rng(0)
    left = rng.normal(size=(10, 64))
    assert frechet_distance(left, left) == pytest.approx(0, abs=1e-6)
    assert np.isfinite(frechet_distance(left, rng.normal(size=(8, 64))))


def real(split: str) -> Digits:
    source = digits(split)  # type: ignore[arg-type]
    return Digits((source.latents.numpy() + 1) / 2, source.labels.numpy())


@pytest.fixture(scope="module")
def judge() -> Evaluator:
    return Evaluator(real("train"))


@pytest.mark.build
def test_judge_knows_digits_it_was_not_trained_on(judge: Evaluator) -> None:
    assert judge.classifier.accuracy(real("held-out")) > 0.97


@pytest.mark.build
def test_judge_is_the_same_every_time(judge: Evaluator) -> None:
    assert Evaluator(real("train")).frechet(real("held-out").pictures) == judge.frechet(real("held-out").pictures)


def test_distance_grows_with_damage(judge: Evaluator) -> None:
    held_out = real("held-out").pictures
    noise = np.random.default_rng(0).normal(size=held_out.shape)
    distances = [judge.frechet(held_out + amount * noise) for amount in (0.0, 0.2, 0.5)]
    assert distances == sorted(distances)
    assert distances[2] > 5 * distances[0]


def test_a_missing_class_shows(judge: Evaluator) -> None:
    held_out = real("held-out")
    assert judge.frechet(held_out.pictures[held_out.labels != 7]) > 1.5 * judge.frechet(held_out.pictures)


def test_wrong_labels_show_in_class_accuracy(judge: Evaluator) -> None:
    held_out = real("held-out")
    assert judge.score(Digits(held_out.pictures, (held_out.labels + 1) % 10), 0).class_accuracy < 0.1
