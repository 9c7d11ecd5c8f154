"""Evaluation samples models alike and scores them alike."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dyexport.bundle.spec import ModelSpec
from dyexport.digits import Digits, load_digits
from dyexport.errors import UsageError
from dyexport.evaluation.evaluate import score_model
from dyexport.evaluation.judges import Judges, built_in_judges
from dyexport.evaluation.paired import KEPT, Trail, compare_latents, compare_samples
from dyexport.evaluation.report import ModelScores
from dyexport.evaluation.samplers import LabelSampler, labels_of
from dyexport.evaluation.settings import EvalSettings, SamplingConfig
from dyexport.presets import get_preset
from tests.factories import spec_of


def spec(name: str = "sit-digits") -> ModelSpec:
    return spec_of(get_preset(name))


def sampler_of(samples: int, steps: int) -> LabelSampler:
    settings = EvalSettings(sampling=SamplingConfig(samples=samples, steps=steps))
    return LabelSampler(spec(), settings.complete(spec()))


@pytest.fixture(scope="module")
def real() -> Digits:
    return load_digits("train")


class Painter:
    """A perfect flow model that knows one picture of each class: its velocity leads straight there."""

    def __init__(self, real: Digits, blur: float = 0.0) -> None:
        self.pictures = torch.stack([torch.from_numpy(real.pictures[real.labels == c][0]) for c in range(10)])
        self.blur = blur

    def __call__(self, *, hidden_states: Any, timestep: Any, class_labels: Any) -> SimpleNamespace:
        data = self.pictures[class_labels] * 2 - 1 + self.blur
        left = (1 - timestep)[:, None, None, None]
        return SimpleNamespace(sample=(data - hidden_states) / left)


def still(**inputs: Any) -> SimpleNamespace:
    """A model that leaves the noise as it is."""
    return SimpleNamespace(sample=torch.zeros_like(inputs["hidden_states"]))


def test_a_model_that_paints_its_label_is_right(real: Digits) -> None:
    sampled = sampler_of(20, 4)(Painter(real), range(20), seed=0)
    assert sampled.labels is not None
    assert sampled.labels.tolist() == [*range(10)] * 2
    assert torch.allclose(sampled.values[:10], Painter(real).pictures, atol=1e-4)


def test_seeds_differ_and_repeat() -> None:
    first, again, other = (sampler_of(10, 1)(still, range(10), seed).values for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.build
def test_scores_by_model_and_seed(real: Digits) -> None:
    judges = built_in_judges("digits")
    seen: list[tuple[int, int]] = []
    good, bad = (
        ModelScores.of("", score_model(model, sampler_of(40, 2), judges, [0, 1], lambda *call: seen.append(call)))
        for model in (Painter(real), Painter(real, blur=0.7))
    )
    assert [scores.seed for scores in good.seeds] == [0, 1]
    assert good.frechet is not None
    assert bad.frechet is not None
    assert good.frechet < bad.frechet
    assert good.class_accuracy is not None
    assert good.class_accuracy > 0.9
    assert seen == [(40, 160), (80, 160), (120, 160), (160, 160)] * 2


@pytest.mark.build
def test_only_the_first_samples_are_compared_pair_by_pair() -> None:
    trails = [Trail(), Trail()]
    for trail, model in zip(trails, (still, Shifted(0.25)), strict=True):
        score_model(model, sampler_of(310, 2), Judges(), [0, 1], trail=trail)
        assert [len(rows.values) for rows in trail.rows] == [300]
        assert len(trail.samples()) == KEPT
    drift, paired = compare_latents(trails[1], trails[0]), compare_samples(trails[1], trails[0])
    noise = sampler_of(310, 2)(still, range(300), seed=0).values
    assert torch.equal(trails[0].samples(), noise[:KEPT])
    assert (drift.samples, len(drift.mean), paired.pairs) == (KEPT, 2, KEPT)
    latents = trails[0].latents()[-1].numpy().reshape(KEPT, -1)
    for step, moved in enumerate((0.999, 1.0)):  # two sigmas of the scheduler: 1 and 0.001
        expected = 0.25 * moved * np.sqrt(64) / np.linalg.norm(latents, axis=1)
        assert drift.mean[step] == pytest.approx(expected.mean(), rel=1e-4)
        assert drift.largest[step] == pytest.approx(expected.max(), rel=1e-4)


class Shifted:
    """A model that adds a constant on the way from noise to data."""

    def __init__(self, shift: float) -> None:
        self.shift = shift

    def __call__(self, **inputs: Any) -> SimpleNamespace:
        return SimpleNamespace(sample=torch.full_like(inputs["hidden_states"], self.shift))


@pytest.mark.build
def test_equal_models_have_no_distance() -> None:
    trails = [Trail(), Trail()]
    for trail in trails:
        score_model(still, sampler_of(4, 2), Judges(), [0], trail=trail)
    paired = compare_samples(*trails)
    assert (paired.equal, paired.psnr, paired.ssim) == (4, None, None)
    assert compare_latents(*trails).largest == (0.0, 0.0)


def test_few_samples_are_of_classes_far_apart() -> None:
    imagenet = spec("dit-s-2")
    assert labels_of(imagenet, 4).tolist() == [0, 250, 500, 750]
    assert labels_of(imagenet, 2000).tolist() == [*range(1000)] * 2
    assert labels_of(spec(), 12).tolist() == [*range(10), 0, 1]


def test_one_sample_has_no_distance() -> None:
    with pytest.raises(UsageError, match="--samples is 1"):
        SamplingConfig(samples=1)
