"""Requests: parsed and checked before sampling, and grouped into batches."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dyexport.arguments import SEEDS, check_guidance, check_pixels, check_seed, check_side, whole_number
from dyexport.errors import UsageError
from dyexport.serving.limits import Limits

Arrays = Mapping[str, np.ndarray]
"""Tensors of a request by name, each (B, 1)."""

LABEL, PROMPT, SEED = "label", "prompt", "seed"
CHARACTER = 4  # bytes of UTF-8 at most
FP32_ROUNDING = 1e-6  # relative


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sampling settings. Requests with equal settings share a batch.

    ``guidance`` is None for a model that takes none; ``height`` and ``width``, in pixels, for a model of class labels,
    which has one size; ``budget`` for a bundle of one.
    """

    steps: int
    guidance: float | None
    height: int | None = None
    width: int | None = None
    budget: float | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """Class labels or prompts, one seed for each, and the settings that they share."""

    labels_or_prompts: tuple[int | str, ...]
    seeds: tuple[int, ...]
    settings: Settings

    @property
    def rows(self) -> list[tuple[int | str, int]]:
        """Label or prompt, and seed, of each sample."""
        return list(zip(self.labels_or_prompts, self.seeds, strict=True))

    def __len__(self) -> int:
        return len(self.labels_or_prompts)


@dataclass(frozen=True, kw_only=True)
class RequestParser:
    """Parser of the requests of one model.

    classes   number of class labels, without the null class; 0: the model takes prompts
    defaults  settings where a request has none
    budgets   of a bundle of several
    """

    classes: int
    defaults: Settings
    budgets: tuple[float, ...] = ()
    limits: Limits = field(default_factory=Limits)

    @property
    def label_or_prompt(self) -> str:
        """Name of the one required input."""
        return LABEL if self.classes else PROMPT

    def parse(self, arrays: Arrays) -> Request:
        """Parse the tensors of a request. Raises ``UsageError`` naming a wrong one."""
        required = self.label_or_prompt
        if required not in arrays:
            raise UsageError(f"{required} is missing, and this model samples from nothing else; send one row a sample")
        rows = len(arrays[required])
        for name, values in arrays.items():
            if not 0 < values.size == rows:
                raise UsageError(f"{name} has {values.size} rows and {required} {rows}; give one for each sample")
        return Request(
            labels_or_prompts=self._labels_or_prompts(arrays[required]),
            seeds=_seeds(arrays.get(SEED), rows),
            settings=self._settings(arrays),
        )

    def _labels_or_prompts(self, values: np.ndarray) -> tuple[int | str, ...]:
        if not self.classes:
            return tuple(self._text(value) for value in values.ravel().tolist())
        labels = tuple(int(value) for value in values.ravel())
        for label in labels:
            if not 0 <= label < self.classes:
                raise UsageError(f"{LABEL} is {label}; this model has classes 0 to {self.classes - 1}")
        return labels

    def _settings(self, arrays: Arrays) -> Settings:
        defaults = self.defaults
        steps = _shared(arrays, "steps", int, defaults.steps)
        guidance = _shared(arrays, "guidance", float, defaults.guidance)
        most = self.limits.max_steps
        whole_number("steps", steps, least=1, most=most, cure=f"this server takes 1 to {most}")
        if guidance is not None:
            check_guidance(guidance)
        budget = self._budget(arrays)
        if self.classes:
            return Settings(steps=steps, guidance=guidance, budget=budget)
        height = check_side(_shared(arrays, "height", int, defaults.height), "height")
        width = check_side(_shared(arrays, "width", int, defaults.width), "width")
        check_pixels(height, width, self.limits.max_pixels, "this server")
        return Settings(steps=steps, guidance=guidance, height=height, width=width, budget=budget)

    def _budget(self, arrays: Arrays) -> float | None:
        """Return one of ``budgets``, from a value in single precision."""
        value = _shared(arrays, "budget", float, self.defaults.budget)
        if value is None:
            return None
        for budget in self.budgets:
            if math.isclose(budget, value, rel_tol=FP32_ROUNDING):
                return budget
        raise UsageError(f"budget is {value:g}; this model has {', '.join(f'{each:g}' for each in self.budgets)}")

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


def _seeds(values: np.ndarray | None, count: int) -> tuple[int, ...]:
    """Return the seeds of a request; random ones by default, so that two requests differ."""
    if values is None:
        return tuple(secrets.randbelow(SEEDS) for _ in range(count))
    return tuple(check_seed(int(value), SEED) for value in values.ravel())


def _shared(arrays: Arrays, name: str, kind: Callable[[Any], Any], default: Any) -> Any:
    """Return the one value of all rows of a request, which share a batch. Raises ``UsageError`` if rows differ."""
    if name not in arrays:
        return default
    values = {kind(value) for value in arrays[name].ravel()}
    if len(values) > 1:
        raise UsageError(f"{name} differs between the rows of a request; send a request for each")
    return values.pop()


def group_by_settings(requests: Mapping[int, Request]) -> list[list[int]]:
    """Group the keys of requests that can share a batch."""
    groups: dict[Settings, list[int]] = {}
    for key, request in requests.items():
        groups.setdefault(request.settings, []).append(key)
    return list(groups.values())


def split_rows(values: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
    """Split a batch (B, ...) into the rows of each request."""
    return np.split(values, np.cumsum(counts)[:-1])
