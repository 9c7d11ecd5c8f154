"""Manifest of a bundle: its model, its segment plan, its engines, and the hash of every file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, Field, NonNegativeInt, model_validator

from dyexport.bundle.plan import SegmentPlan, segment_name
from dyexport.bundle.records import Frozen
from dyexport.bundle.spec import ModelSpec, Widths

SCHEMA_VERSION = 3

CONDITIONING = "conditioning"
DENSE = "dense"
DENSE_CONDITIONING = "dense-conditioning"  # absent where the static model's is the dynamic one's
SHARED = frozenset({DENSE, DENSE_CONDITIONING})  # networks that all budgets of a bundle have in common
BUDGETS = "budgets"  # folder of the other budgets, each a folder with a manifest


def _inside(path: str) -> str:
    """Require a relative path that cannot leave the bundle."""
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or any(letter in path for letter in "\\:\0"):
        raise ValueError(f"{path!r} points outside the bundle")
    return path


BundlePath = Annotated[str, AfterValidator(_inside)]


class EngineRecord(Frozen):
    """One engine file. ``network`` is a segment's name, ``conditioning``, ``dense`` or ``dense-conditioning``."""

    target: str
    network: str
    path: BundlePath


class Reference(Frozen):
    """The masked torch model the bundle was cut from, for ``dyexport verify``."""

    path: str
    sha256: str


class FileRecord(Frozen):
    sha256: str
    bytes: NonNegativeInt


def budget_folder(budget: float, version: int = 1) -> str:
    """Return a folder for a budget that is not the bundle's default, from the root of the bundle.

    Engines that are added to a bundle change its manifests, which then get folders of the next free version.
    """
    return f"{BUDGETS}/{budget:g}" if version == 1 else f"{BUDGETS}/{budget:g}-{version}"


def _is_folder_of(folder: str, budget: float) -> bool:
    return re.fullmatch(rf"{re.escape(budget_folder(budget))}(-[1-9]\d*)?", folder) is not None


class Manifest(Frozen):
    """Contents of a bundle: the model, the plan of its engines, and the hash of every file.

    A bundle of several ``budgets`` has a manifest for each. That of the default one is at the root and has the hashes
    of all files. Each other one is in its ``folder``, and can be opened as a bundle of that budget alone. Paths are
    relative to the root.
    """

    schema_version: int
    dyexport_version: str
    model: ModelSpec
    budget: Annotated[float, Field(gt=0, le=1)] | None
    budgets: tuple[float, ...] = ()
    folder: BundlePath | None = None
    widths: Widths = "dynamic"
    plan: SegmentPlan
    engines: tuple[EngineRecord, ...]
    reference: Reference | None
    metrics: dict[str, float]
    files: dict[BundlePath, FileRecord]

    @model_validator(mode="after")
    def _complete(self) -> Manifest:
        if self.plan.span != self.model.timestep_range:
            raise ValueError(f"the plan covers {self.plan.span} of the range {self.model.timestep_range}")
        for segment in self.plan.segments:
            if segment.capacities and max(segment.capacities) > self.model.tokens:
                raise ValueError(f"a capacity of {max(segment.capacities)} is more than {self.model.tokens} tokens")
        if self.widths == "static" and not self.plan.is_static:
            raise ValueError("static widths need one segment without gates and token routers")
        if self.budgets and self.budget not in self.budgets:
            raise ValueError(f"the budget {self.budget} is none of {list(self.budgets)}")
        if self.folder is not None and (self.budget is None or not _is_folder_of(self.folder, self.budget)):
            raise ValueError(f"{self.folder} is not the folder of budget {self.budget}")
        problem = next(self._engine_problems(), None)
        if problem is not None:
            raise ValueError(problem)
        return self

    @property
    def own_engines(self) -> list[EngineRecord]:
        """The engines of this budget: without those of networks that all budgets share, if it is not the default."""
        return [engine for engine in self.engines if self.folder is None or engine.network not in SHARED]

    def place(self, name: str) -> str:
        """Return the path, from the root, of a file of which each budget has one."""
        return name if self.folder is None else f"{self.folder}/{name}"

    def folder_of(self, budget: float) -> str | None:
        """Return the folder of one of ``budgets``; None for the default one. Asks the manifest at the root."""
        if budget == self.budget:
            return None
        folders = ("/".join(PurePosixPath(name).parts[:2]) for name in self.files)
        return next((folder for folder in folders if _is_folder_of(folder, budget)), budget_folder(budget))

    def _engine_problems(self) -> Iterator[str]:
        known = {segment_name(index) for index in range(len(self.plan.segments))}
        known |= {CONDITIONING, DENSE, DENSE_CONDITIONING}
        seen: set[tuple[str, str] | str] = set()
        for engine in self.engines:
            if engine.path not in self.files:
                yield f"{engine.path} has no hash"
            if engine.network not in known:
                yield f"{engine.path} is of {engine.network!r}, which is not in the plan"
            if (engine.target, engine.network) in seen:
                yield f"{engine.target!r} has two engines of {engine.network!r}"
            if engine.path in seen:
                yield f"{engine.path} is the engine of two networks"
            seen |= {(engine.target, engine.network), engine.path}
