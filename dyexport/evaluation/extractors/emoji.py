"""Features and classes of emoji, by a classifier trained on real emoji, once on each machine."""

from __future__ import annotations

import sys
from functools import cache

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dyexport.emoji import CLASSES, Emoji, load_emoji
from dyexport.errors import DataError
from dyexport.files import replacing, user_cache

STORE = (
    "emoji-classifier-v1.safetensors"  # in the user's cache; a change of the network or its training needs a new name
)
FEATURES = 64
CHANNELS = (16, 32, 64)  # at 32, 16 and 8 pixels
EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 12, 60, 4e-3, 0.05
SHIFT = 2  # pixels by which training pictures move
CHUNK = 500  # pictures of one forward pass
SEED = 0


class EmojiClassifier:
    """Small convolutional network on pictures (n, 3, 32, 32) with values in [0, 1].

    Its weights are the same in every process that shares the user's cache. They are not the same on every machine, and
    neither are distances between features: compare those of one machine only.
    """

    def __init__(self, network: nn.Sequential) -> None:
        self._network = network.eval()

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        """Compute the activations before the last layer: (n, 3, 32, 32) -> (n, 64)."""
        return torch.cat([self._network[:-1](chunk) for chunk in pictures.float().cpu().split(CHUNK)])

    @torch.no_grad()
    def classes(self, pictures: Tensor) -> Tensor:
        """Return the most likely class of each picture: (n, 3, 32, 32) -> (n,)."""
        classes: Tensor = self._network[-1](self.features(pictures)).argmax(dim=1)
        return classes


@cache
def trained_classifier() -> EmojiClassifier:
    """Read the classifier of the training split from the user's cache; train it if it is not there.

    Raises ``DataError``.
    """
    path, network = user_cache() / STORE, _network()
    if not path.exists():
        print("Training the classifier of emoji, once: about a minute", file=sys.stderr)
        trained = train(load_emoji("train"), EPOCHS)
        with replacing(path) as partial:
            save_file(trained.state_dict(), partial)
    try:
        network.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise DataError(f"cannot read {path}; delete it, and the classifier is trained again") from error
    return EmojiClassifier(network)


class EmojiFeatures:
    """Features of emoji (B, 64)."""

    name = "emoji"

    def __call__(self, pictures: Tensor) -> Tensor:
        return trained_classifier().features(pictures)  # (B, 64)


class EmojiClasses:
    """Classes of emoji."""

    name = "emoji"

    def __call__(self, pictures: Tensor) -> Tensor:
        return trained_classifier().classes(pictures)  # (B,)


def _network() -> nn.Sequential:
    layers: list[nn.Module] = []
    before = 3
    for channels in CHANNELS:
        layers += [nn.Conv2d(before, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
        before = channels
    size = before * 4 * 4
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(size, FEATURES), nn.ReLU(), nn.Linear(FEATURES, len(CLASSES)))


def train(emoji: Emoji, epochs: int) -> nn.Sequential:
    """Train a classifier on pictures (n, 3, 32, 32) with values in [0, 1], always with the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = _network().train()
        pictures, labels = torch.from_numpy(emoji.pictures), torch.from_numpy(emoji.labels)
        steps = epochs * -(-len(labels) // BATCH)
        optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(labels)).split(BATCH):
                loss = F.cross_entropy(network(_shifted(pictures[rows])), labels[rows], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return network.eval()


def _shifted(pictures: Tensor) -> Tensor:
    """Move a batch (B, 3, H, W) by up to two pixels, with white around it."""
    height, width = pictures.shape[-2:]
    top, left = torch.randint(2 * SHIFT + 1, (2,)).tolist()
    padded = F.pad(pictures, (SHIFT,) * 4, value=1.0)
    return padded[..., top : top + height, left : left + width]
