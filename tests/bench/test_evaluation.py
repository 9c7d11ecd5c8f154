"""Evaluation draws alike and judges alike."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dyexport.bench.evaluation import mean_accuracy, mean_frechet, sample_digits, score_models
from dyexport.bench.quality import Evaluator
from dyexport.bench.settings import SamplingConfig
from dyexport.bundle.spec import ModelSpec
from dyexport.digits import Digits
from dyexport.errors import UsageError
from dyexport.presets import get_preset
from dyexport.training.data import digits
from tests.factories import spec_of


def spec(name: str = "sit-digits") -> ModelSpec:
    return spec_of(get_preset(name))


@pytest.fixture(scope="module")
def real() -> Digits:
    source = digits("train")
    return Digits((source.latents.numpy() + 1) / 2, source.labels.numpy())


class Painter:
    """A perfect flow model that knows one picture of each class: its velocity leads straight there."""

    def __init__(self, real: Digits, blur: float = 0.0) -> None:
        self.pictures = torch.stack([torch.from_numpy(real.pictures[real.labels == c][0]) for c in range(10)])
        self.blur = blur

    def __call__(self, *, hidden_states: Any, timestep: Any, class_labels: Any) -> SimpleNamespace:
        data = self.pictures[class_labels] * 2 - 1 + self.blur
        left = (1 - timestep)[:, None, None, None]
        return SimpleNamespace(sample=(data - hidden_states) / left)


def test_a_model_that_draws_its_label_is_right(real: Digits) -> None:
    sampled = sample_digits(Painter(real), spec(), SamplingConfig(samples=20, steps=4), seed=0)
    assert sampled.labels.tolist() == [*range(10)] * 2
    assert torch.allclose(torch.from_numpy(sampled.pictures[:10]), Painter(real).pictures, atol=1e-4)


def test_seeds_differ_and_repeat(real: Digits) -> None:
    def noise(**inputs: Any) -> SimpleNamespace:
        return SimpleNamespace(sample=torch.zeros_like(inputs["hidden_states"]))

    sampling = SamplingConfig(samples=10, steps=1)
    first, again, other = (sample_digits(noise, spec(), sampling, seed).pictures for seed in (0, 0, 1))
    assert (first == again).all()
    assert not (first == other).all()


def test_scores_by_model_and_seed(real: Digits) -> None:
    models = {"good": Painter(real), "bad": Painter(real, blur=0.7)}
    seen: list[tuple[int, int]] = []
    sampling = SamplingConfig(samples=40, steps=2)
    scores = score_models(models, spec(), Evaluator(real), sampling, [0, 1], lambda *call: seen.append(call))
    assert [score.seed for score in scores["good"]] == [0, 1]
    assert mean_frechet(scores["good"]) < mean_frechet(scores["bad"])
    assert mean_accuracy(scores["good"]) > 0.9
    assert seen == [(0, 160), (40, 160), (80, 160), (120, 160)]


@pytest.mark.parametrize("name", ["dit-s-2", "flux", "latte"])
def test_other_models_cannot_be_scored(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is not a digits model"):
        sample_digits(lambda **_: None, spec(name), SamplingConfig(), 0)


def test_one_sample_has_no_distance() -> None:
    with pytest.raises(UsageError, match="--samples is 1"):
        SamplingConfig(samples=1)
