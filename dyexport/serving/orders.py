"""What a request asks for, checked before anything is drawn: rows of labels or prompts, and how to draw them."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dyexport.errors import UsageError

Arrays = Mapping[str, np.ndarray]
"""Tensors of a request by name, each (B, 1)."""

LABEL, PROMPT, SEED = "label", "prompt", "seed"
SIDE_MULTIPLE = 16  # pixels; a VAE makes one latent of 8 x 8, a patch is 2 x 2 latents
SEEDS = 2**63  # as many as an INT64 holds


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to draw; samples that agree in all of it are drawn together. Sizes in pixels; models of labels have one."""

    steps: int
    guidance: float
    height: int | None = None
    width: int | None = None


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a request asks for: a class label or a prompt, and a seed, for each sample."""

    subjects: tuple[int | str, ...]
    seeds: tuple[int, ...]
    settings: Settings

    @property
    def rows(self) -> list[tuple[int | str, int]]:
        """What to draw, and from which seed, sample by sample."""
        return list(zip(self.subjects, self.seeds, strict=True))

    def __len__(self) -> int:
        return len(self.subjects)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may ask for, so that no single one holds up the server or fills its memory."""

    max_steps: int = 100
    max_pixels: int = 2048 * 2048


@dataclass(frozen=True, kw_only=True)
class OrderBook:
    """Reads the requests of one model. ``classes`` counts its labels, the null class left out; 0 takes prompts."""

    classes: int
    usual: Settings
    limits: Limits = Limits()

    @property
    def subject(self) -> str:
        """The one input that must be there."""
        return LABEL if self.classes else PROMPT

    def read(self, arrays: Arrays) -> Order:
        """Raises ``UsageError`` for what cannot be drawn."""
        subjects = self._subjects(arrays[self.subject])
        seeds = self._seeds(arrays.get(SEED), len(subjects))
        return Order(subjects=subjects, seeds=seeds, settings=self._settings(arrays))

    def _subjects(self, values: np.ndarray) -> tuple[int | str, ...]:
        if not self.classes:
            return tuple(_text(value) for value in values.ravel().tolist())
        labels = tuple(int(value) for value in values.ravel())
        for label in labels:
            if not 0 <= label < self.classes:
                raise UsageError(f"{LABEL} is {label}; this model has classes 0 to {self.classes - 1}")
        return labels

    def _seeds(self, values: np.ndarray | None, count: int) -> tuple[int, ...]:
        """Drawn where none are asked for, so that two requests differ."""
        if values is None:
            return tuple(secrets.randbelow(SEEDS) for _ in range(count))
        seeds = tuple(int(value) for value in values.ravel())
        if len(seeds) != count:
            raise UsageError(f"{SEED} has {len(seeds)} rows and {self.subject} {count}; give one for each")
        if min(seeds) < 0:
            raise UsageError(f"{SEED} is {min(seeds)}; give 0 or more")
        return seeds

    def _settings(self, arrays: Arrays) -> Settings:
        usual = self.usual
        steps = _shared(arrays, "steps", int, usual.steps)
        guidance = _shared(arrays, "guidance", float, usual.guidance)
        if not 1 <= steps <= self.limits.max_steps:
            raise UsageError(f"steps is {steps}; this server takes 1 to {self.limits.max_steps}")
        if not math.isfinite(guidance):
            raise UsageError(f"guidance is {guidance}; give a number, 1 being none")
        if self.classes:
            return Settings(steps=steps, guidance=guidance)
        height = _shared(arrays, "height", int, usual.height)
        width = _shared(arrays, "width", int, usual.width)
        self._check_size(height, width)
        return Settings(steps=steps, guidance=guidance, height=height, width=width)

    def _check_size(self, height: int, width: int) -> None:
        for name, value in (("height", height), ("width", width)):
            if value <= 0 or value % SIDE_MULTIPLE:
                raise UsageError(f"{name} is {value}; give a multiple of {SIDE_MULTIPLE}")
        if height * width > self.limits.max_pixels:
            raise UsageError(
                f"{height} x {width} are {height * width} pixels; this server draws up to {self.limits.max_pixels}"
            )


def _text(value: Any) -> str:
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise UsageError(f"{PROMPT} is not UTF-8: {error.reason} at byte {error.start}") from error


def _shared(arrays: Arrays, name: str, kind: Callable[[Any], Any], usual: Any) -> Any:
    """The one value of all rows of a request, which are drawn together."""
    if name not in arrays:
        return usual
    values = {kind(value) for value in arrays[name].ravel()}
    if len(values) > 1:
        raise UsageError(f"{name} differs between the rows of a request; send a request for each")
    return values.pop()


def together(orders: Mapping[int, Order]) -> list[list[int]]:
    """Which orders, by key, to draw in one batch: those of the same settings."""
    groups: dict[Settings, list[int]] = {}
    for key, order in orders.items():
        groups.setdefault(order.settings, []).append(key)
    return list(groups.values())


def split(values: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
    """Rows of a batch (B, ...) back to their orders."""
    return np.split(values, np.cumsum(counts)[:-1])
