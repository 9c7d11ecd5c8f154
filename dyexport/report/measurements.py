"""Measurements of other commands, read from their JSON files: ``bench -o FILE`` and ``eval --json > FILE``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError, model_validator

from dyexport.bench.rows import BenchReport
from dyexport.bundle.manifest import Manifest
from dyexport.bundle.records import first_problem
from dyexport.errors import DataError, UsageError

SAME = 1e-6  # relative difference of FLOPs ratios of one bundle


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Scores of one network: the mean Frechet distance over seeds, and the least and the greatest."""

    name: str
    frechet: float
    low: float
    high: float
    seeds: int


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Distances that ``eval`` measured, by network; none where it had no data to compare samples with.

    ``features`` names the features that distances are of, ``real`` is the distance of held-out real data.
    """

    samples: int
    features: str | None
    qualities: tuple[Quality, ...]
    real: float | None

    def find(self, name: str) -> Quality | None:
        return next((quality for quality in self.qualities if quality.name == name), None)


class _Score(BaseModel):
    frechet: float | None = None


class _Scores(BaseModel):
    model: str
    seeds: list[_Score]


class _EvalFile(BaseModel):
    """The part of a result of ``eval`` that a report shows. Seeds are in ``per_seed`` in results of older versions."""

    model: str
    samples: int
    flops_ratio: float
    frechet_real: float | None = None
    features: str | None = None
    models: list[_Scores] = []
    per_seed: dict[str, list[_Score]] = {}

    @model_validator(mode="after")
    def _scored(self) -> _EvalFile:
        if not self.models and not self.per_seed:
            raise ValueError("it has the scores of no model")
        return self

    def distances(self) -> dict[str, list[float]]:
        """Return the Frechet distances of all seeds, by model; none for a model that was not compared with data."""
        scores = self.per_seed | {each.model: each.seeds for each in self.models}
        known = {name: [seed.frechet for seed in seeds if seed.frechet is not None] for name, seeds in scores.items()}
        return {name: distances for name, distances in known.items() if distances}


def read_bench(path: Path, manifest: Manifest) -> BenchReport:
    """Read the JSON of ``dyexport bench``. Raises ``DataError``, and ``UsageError`` for one of another bundle."""
    made_by = f"dyexport bench BUNDLE -o {path.name}"
    content = _read(path, "--bench", made_by)
    try:
        report: BenchReport = TypeAdapter(BenchReport).validate_python(content)
    except ValidationError as error:
        raise DataError(
            f"--bench {path} is no report of bench: {first_problem(error)}; make it by: {made_by}"
        ) from error
    _check_same("--bench", path, manifest, report.model, report.flops_ratio)
    return report


def read_eval(path: Path, manifest: Manifest) -> Evaluation:
    """Read the JSON of ``dyexport eval``. Raises ``DataError``, and ``UsageError`` for one of another bundle."""
    made_by = f"dyexport eval BUNDLE --json > {path.name}"
    content = _read(path, "--eval", made_by)
    try:
        stored = _EvalFile.model_validate(content)
    except ValidationError as error:
        raise DataError(f"--eval {path} is no result of eval: {first_problem(error)}; make it by: {made_by}") from error
    _check_same("--eval", path, manifest, stored.model, stored.flops_ratio)
    qualities = tuple(_quality(name, distances) for name, distances in stored.distances().items())
    return Evaluation(samples=stored.samples, features=stored.features, qualities=qualities, real=stored.frechet_real)


def _quality(name: str, distances: list[float]) -> Quality:
    return Quality(name=name, frechet=fmean(distances), low=min(distances), high=max(distances), seeds=len(distances))


def _read(path: Path, option: str, made_by: str) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no JSON"
        raise DataError(f"cannot read {option} {path}: {reason}; make it by: {made_by}") from error
    if not isinstance(content, dict):
        raise DataError(f"{option} {path} holds no JSON object; make it by: {made_by}")
    return content


def _check_same(option: str, path: Path, manifest: Manifest, model: str, flops_ratio: float) -> None:
    ours = manifest.plan.flops_ratio
    if model != manifest.model.name or abs(flops_ratio - ours) > SAME * ours:
        raise UsageError(
            f"{option} {path} measures {model} at a FLOPs ratio of {flops_ratio:.4f}, and this bundle is "
            f"{manifest.model.name} at {ours:.4f}; measure this one"
        )
