"""What a request asks for, checked before anything is drawn: rows of labels or prompts, and how to draw them."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dyexport.arguments import SEEDS, check_guidance, check_pixels, check_seed, check_side, whole_number
from dyexport.errors import UsageError

Arrays = Mapping[str, np.ndarray]
"""Tensors of a request by name, each (B, 1)."""

LABEL, PROMPT, SEED = "label", "prompt", "seed"
CHARACTER = 4  # bytes of UTF-8 at most


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to draw; samples that agree in all of it are drawn together. Sizes in pixels; models of labels have one."""

    steps: int
    guidance: float | None  # None: the model takes none
    height: int | None = None
    width: int | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
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
    max_prompt: int = 4000  # characters; T5 reads some 2500, and cutting a long text into words takes its time


@dataclass(frozen=True, kw_only=True)
class RequestParser:
    """Reads the requests of one model. ``classes`` counts its labels, the null class left out; 0 takes prompts."""

    classes: int
    usual: Settings
    limits: Limits = Limits()

    @property
    def subject(self) -> str:
        """The one input that must be there."""
        return LABEL if self.classes else PROMPT

    def read(self, arrays: Arrays) -> Request:
        """Raises ``UsageError`` for what cannot be drawn."""
        if self.subject not in arrays:
            raise UsageError(
                f"{self.subject} is missing, and this model draws from nothing else; send one row a sample"
            )
        rows = len(arrays[self.subject])
        for name, values in arrays.items():
            if not 0 < values.size == rows:
                raise UsageError(f"{name} has {values.size} rows and {self.subject} {rows}; give one for each sample")
        subjects = self._subjects(arrays[self.subject])
        seeds = self._seeds(arrays.get(SEED), rows)
        return Request(subjects=subjects, seeds=seeds, settings=self._settings(arrays))

    def _subjects(self, values: np.ndarray) -> tuple[int | str, ...]:
        if not self.classes:
            return tuple(self._text(value) for value in values.ravel().tolist())
        labels = tuple(int(value) for value in values.ravel())
        for label in labels:
            if not 0 <= label < self.classes:
                raise UsageError(f"{LABEL} is {label}; this model has classes 0 to {self.classes - 1}")
        return labels

    def _seeds(self, values: np.ndarray | None, count: int) -> tuple[int, ...]:
        """Drawn where none are asked for, so that two requests differ."""
        if values is None:
            return tuple(secrets.randbelow(SEEDS) for _ in range(count))
        return tuple(check_seed(int(value), SEED) for value in values.ravel())

    def _settings(self, arrays: Arrays) -> Settings:
        usual = self.usual
        steps = _shared(arrays, "steps", int, usual.steps)
        guidance = _shared(arrays, "guidance", float, usual.guidance)
        most = self.limits.max_steps
        whole_number("steps", steps, least=1, most=most, cure=f"this server takes 1 to {most}")
        if guidance is not None:
            check_guidance(guidance)
        if self.classes:
            return Settings(steps=steps, guidance=guidance)
        height = _shared(arrays, "height", int, usual.height)
        width = _shared(arrays, "width", int, usual.width)
        self._check_size(height, width)
        return Settings(steps=steps, guidance=guidance, height=height, width=width)

    def _check_size(self, height: int, width: int) -> None:
        check_pixels(check_side(height, "height"), check_side(width, "width"), self.limits.max_pixels, "this server")

    def _text(self, value: Any) -> str:
        most = self.limits.max_prompt
        if len(value) > most * CHARACTER:
            raise UsageError(f"{PROMPT} has {len(value)} bytes; this server takes up to {most} characters")
        try:
            text = value.decode("utf-8") if isinstance(value, bytes) else str(value)
        except UnicodeDecodeError as error:
            raise UsageError(f"{PROMPT} is not UTF-8: {error.reason} at byte {error.start}") from error
        if len(text) > most:
            raise UsageError(f"{PROMPT} has {len(text)} characters; this server takes up to {most}")
        return text


def _shared(arrays: Arrays, name: str, kind: Callable[[Any], Any], usual: Any) -> Any:
    """The one value of all rows of a request, which are drawn together."""
    if name not in arrays:
        return usual
    values = {kind(value) for value in arrays[name].ravel()}
    if len(values) > 1:
        raise UsageError(f"{name} differs between the rows of a request; send a request for each")
    return values.pop()


def together(orders: Mapping[int, Request]) -> list[list[int]]:
    """Which orders, by key, to draw in one batch: those of the same settings."""
    groups: dict[Settings, list[int]] = {}
    for key, order in orders.items():
        groups.setdefault(order.settings, []).append(key)
    return list(groups.values())


def split(values: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
    """Rows of a batch (B, ...) back to their orders."""
    return np.split(values, np.cumsum(counts)[:-1])
