"""Frechet distance of digits, and a classifier that can tell good digits from bad ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dyexport.digits import load_digits
from dyexport.evaluation.extractors.digits import DigitClassifier
from dyexport.evaluation.judges import Judges, Tally, built_in_judges, real_distance
from dyexport.evaluation.samplers import Rows
from dyexport.evaluation.scores import frechet_distance
from dyexport.evaluation.settings import EvalSettings
from tests.evaluation import frechet

HELD_OUT = load_digits("held-out")


@pytest.fixture(scope="module")
def judges() -> Judges:
    return built_in_judges("digits")


def distance(judges: Judges, pictures: np.ndarray) -> float:
    assert judges.extractor is not None
    assert judges.reference is not None
    return frechet_distance(judges.extractor(torch.from_numpy(pictures)), judges.reference)


@pytest.mark.build
def test_classifier_knows_digits_it_was_not_trained_on(judges: Judges) -> None:
    assert judges.classifier is not None
    assert (judges.classifier(torch.from_numpy(HELD_OUT.pictures)).numpy() == HELD_OUT.labels).mean() > 0.97


@pytest.mark.build
def test_classifier_is_the_same_every_time(judges: Judges) -> None:
    assert judges.extractor is not None
    again = DigitClassifier(load_digits("train")).features(HELD_OUT.pictures)
    assert (again == judges.extractor(torch.from_numpy(HELD_OUT.pictures)).numpy()).all()


@pytest.mark.build
@pytest.mark.parametrize("count", [20, 64, 359])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_distance_equals_the_one_in_numpy(judges: Judges, count: int, noise: float) -> None:
    assert judges.extractor is not None
    assert judges.reference is not None
    damage = np.random.default_rng(0).normal(size=HELD_OUT.pictures[:count].shape)
    features = judges.extractor(torch.from_numpy(HELD_OUT.pictures[:count] + noise * damage))
    expected = frechet.frechet_distance(features.numpy(), judges.reference.numpy())
    assert frechet_distance(features, judges.reference) == pytest.approx(expected, rel=1e-3)


@pytest.mark.build
def test_distance_grows_with_damage(judges: Judges) -> None:
    noise = np.random.default_rng(0).normal(size=HELD_OUT.pictures.shape)
    distances = [distance(judges, HELD_OUT.pictures + amount * noise) for amount in (0.0, 0.2, 0.5)]
    assert distances == sorted(distances)
    assert distances[2] > 5 * distances[0]
    assert real_distance(EvalSettings(real="digits"), judges) == distances[0]


@pytest.mark.build
def test_a_missing_class_shows(judges: Judges) -> None:
    sevens = HELD_OUT.labels == 7
    assert distance(judges, HELD_OUT.pictures[~sevens]) > 1.5 * distance(judges, HELD_OUT.pictures)


@pytest.mark.build
def test_wrong_labels_show_in_class_accuracy(judges: Judges) -> None:
    tally = Tally(judges)
    wrong = torch.from_numpy((HELD_OUT.labels + 1) % 10)
    tally.add(Rows(torch.from_numpy(HELD_OUT.pictures), pixels=True, labels=wrong))
    accuracy = tally.scores(0).class_accuracy
    assert accuracy is not None
    assert accuracy < 0.1
