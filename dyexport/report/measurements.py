"""Measurements of other commands, read from their JSON files: ``bench -o FILE`` and ``eval --json > FILE``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

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
    """What ``eval`` measured; ``real`` is the distance of held-out real pictures, None where it is not known."""

    samples: int
    qualities: tuple[Quality, ...]
    real: float | None

    def find(self, name: str) -> Quality | None:
        return next((quality for quality in self.qualities if quality.name == name), None)


class _Score(BaseModel):
    model_config = ConfigDict(extra="ignore")

    frechet: float


class _EvalFile(BaseModel):
    model_config = ConfigDict(extra="ignore")

    model: str
    samples: int
    flops_ratio: float
    frechet_real: float | None = None
    per_seed: dict[str, list[_Score]]


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
    qualities = tuple(_quality(name, scores) for name, scores in stored.per_seed.items() if scores)
    return Evaluation(samples=stored.samples, qualities=qualities, real=stored.frechet_real)


def _quality(name: str, scores: list[_Score]) -> Quality:
    distances = [score.frechet for score in scores]
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
