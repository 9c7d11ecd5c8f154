"""Measurements of other commands, read from their JSON files: ``bench -o FILE`` and ``eval -o FILE``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from dyexport.bench.rows import BenchReport
from dyexport.bundle.manifest import Manifest
from dyexport.bundle.records import first_problem
from dyexport.errors import DataError, UsageError
from dyexport.evaluation.report import EvalReport

SAME = 1e-6  # relative difference of FLOPs ratios of one bundle

T = TypeVar("T", BenchReport, EvalReport)


def read_bench(path: Path, manifest: Manifest) -> BenchReport:
    """Read the JSON of ``dyexport bench``. Raises ``DataError``, and ``UsageError`` for one of another bundle."""
    return _read(path, "bench", BenchReport, manifest)


def read_eval(path: Path, manifest: Manifest) -> EvalReport:
    """Read the JSON of ``dyexport eval``. Raises ``DataError``, and ``UsageError`` for one of another bundle."""
    return _read(path, "eval", EvalReport, manifest)


def _read(path: Path, command: str, kind: type[T], manifest: Manifest) -> T:
    cure = f"make it by: dyexport {command} BUNDLE -o {path.name}"
    content = _object(path, command, cure)
    try:
        report = TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        raise DataError(f"--{command} {path} is not from {command}: {first_problem(error)}; {cure}") from error
    ours = manifest.plan.flops_ratio
    if report.model != manifest.model.name or abs(report.flops_ratio - ours) > SAME * ours:
        raise UsageError(
            f"--{command} {path} measures {report.model} at a FLOPs ratio of {report.flops_ratio:.4f}, and this bundle "
            f"is {manifest.model.name} at {ours:.4f}; measure this one"
        )
    return report


def _object(path: Path, command: str, cure: str) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no JSON"
        raise DataError(f"cannot read --{command} {path}: {reason}; {cure}") from error
    if not isinstance(content, dict):
        raise DataError(f"--{command} {path} holds no JSON object; {cure}")
    return content
