"""The classifier of emoji, on pictures of one color for each class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dyexport.emoji import CLASSES, Emoji
from dyexport.errors import DataError
from dyexport.evaluation.extractors import emoji as extractor
from dyexport.evaluation.extractors.emoji import STORE, EmojiClasses, EmojiFeatures, train, trained_classifier
from dyexport.evaluation.settings import EvalSettings
from dyexport.files import user_cache
from dyexport.presets import get_preset
from tests.factories import spec_of


def one_color_each(count: int, seed: int) -> Emoji:
    """Return pictures of one color for each class, with a little noise."""
    labels = np.arange(count) % len(CLASSES)
    colors = np.stack([labels % 3, labels // 3, 0 * labels], axis=1) / 2  # (n, 3)
    noise = np.random.default_rng(seed).normal(0, 0.05, (count, 3, 32, 32))
    return Emoji((colors[:, :, None, None] + noise).astype(np.float32), labels)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("DYEXPORT_CACHE", str(tmp_path))
    monkeypatch.setattr(extractor, "load_emoji", lambda split: one_color_each(90, 0))
    monkeypatch.setattr(extractor, "EPOCHS", 8)
    monkeypatch.setattr(extractor, "BATCH", 18)
    yield tmp_path
    trained_classifier.cache_clear()


def test_classes_of_other_pictures_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    other = one_color_each(45, 1)
    pictures = torch.from_numpy(other.pictures)
    assert EmojiClasses()(pictures).tolist() == other.labels.tolist()
    assert EmojiFeatures()(pictures).shape == (45, 64)
    assert "Training the classifier" in capsys.readouterr().err


def test_the_classifier_is_trained_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = torch.from_numpy(one_color_each(9, 1).pictures)
    first = EmojiFeatures()(pictures)
    trained_classifier.cache_clear()
    capsys.readouterr()
    assert torch.equal(EmojiFeatures()(pictures), first)
    assert capsys.readouterr().err == ""
    (user_cache() / STORE).write_bytes(b"damaged")
    trained_classifier.cache_clear()
    with pytest.raises(DataError, match="delete it"):
        EmojiFeatures()(pictures)


def test_training_repeats_and_leaves_the_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    first, second = (train(one_color_each(36, 0), epochs=1).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), state)


def test_models_of_emoji_are_scored_against_emoji() -> None:
    settings = EvalSettings().complete(spec_of(get_preset("sit-emoji")))
    assert (settings.features, settings.real, settings.classifier) == ("emoji",) * 3
