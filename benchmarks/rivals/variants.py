"""The variants that are compared, and the numbers of steps at which each is sampled."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.quality import BUNDLE, CONTROL, STATIC, Family, Kind
from dyexport.pipeline.settings import BuildSettings

DENSE, WIDTHS, DYNAMIC = "dense", "static", "dynamic"
REUSE, CACHE_DIT, DYNAMIC_REUSE, COMPILE = "reuse", "cache-dit", "dynamic-reuse", "compile"
EAGER_MODULE = "eager"  # of bundles alone
MODELS = (DENSE, CONTROL, WIDTHS, DYNAMIC, REUSE, CACHE_DIT, DYNAMIC_REUSE, COMPILE)

TITLES = {
    DENSE: "dense",
    CONTROL: "control",
    WIDTHS: "static widths",
    DYNAMIC: "dynamic",
    REUSE: "dense",
    CACHE_DIT: "dense",
    DYNAMIC_REUSE: "dynamic",
    COMPILE: "torch.compile",
    EAGER_MODULE: "diffusers, eager",
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to make sampling cheaper, one of ``MODELS`` or a bundle by its name.

    ``budget`` is the lambda of a slim model, ``share`` what a cache computes.
    """

    name: str
    budget: float | None = None
    share: float | None = None

    @property
    def label(self) -> str:
        """Return such as ``dynamic 0.5 + reuse 0.3``: lambda, and the share that the cache computes."""
        network = TITLES.get(self.name, self.name) + ("" if self.budget is None else f" {self.budget:g}")
        cache = CACHE_DIT if self.name == CACHE_DIT else REUSE
        return network if self.share is None else f"{network} + {cache} {self.share:g}"

    @property
    def kind(self) -> Kind:
        """Kind of model that is trained for it."""
        if self.name == CONTROL:
            return CONTROL
        return BUNDLE if self.budget is not None else STATIC

    @property
    def folder(self) -> str:
        """Folder of its model, which variants with and without a cache share."""
        name = DYNAMIC if self.name == DYNAMIC_REUSE else self.name
        return name if self.budget is None else f"{name}-{self.budget:g}"

    @property
    def engines(self) -> str:
        """Name of the network whose engines it runs: of the static model in any form those of the dense graph."""
        return DENSE if self.name in (CONTROL, REUSE) else self.folder

    def settings(self, family: Family, static: Any, seed: int) -> BuildSettings:
        """Return the settings of its model."""
        if self.kind == STATIC:
            return family.static
        slim: dict[str, Any] = {} if self.budget is None else {"budget": self.budget}
        if self.name == WIDTHS:
            slim |= {"widths": "static", "engines": 1}
        return family.tuned(self.folder, static, seed, **slim)

    def seeds(self, seeds: Sequence[int]) -> tuple[int | None, ...]:
        """Return the seeds of its training; the static model has one only."""
        return (None,) if self.kind == STATIC else tuple(seeds)

    def steps(self, steps: Sequence[int], budgets: Sequence[float]) -> tuple[int, ...]:
        """Return the numbers of steps at which it is sampled: dense networks also at equal FLOPs."""
        if self.name in (DENSE, CONTROL):
            equal = {equal_flops_steps(count, budget) for count in steps for budget in budgets}
            return tuple(sorted({*steps, *equal}))
        return tuple(sorted(set(steps)))


def equal_flops_steps(steps: int, budget: float) -> int:
    """Return the steps of a dense network that cost as much as ``steps`` at a budget: rounded, half of a step up."""
    return max(math.floor(steps * budget + 0.5), 1)


def variants_of(names: Collection[str], budgets: Sequence[float], shares: Sequence[float]) -> Iterator[Variant]:
    """Yield the variants of these names, in the order of the tables; caches at every share of computed outputs."""
    for name in (name for name in MODELS if name in names):
        if name in (WIDTHS, DYNAMIC):
            yield from (Variant(name=name, budget=budget) for budget in budgets)
        elif name in (REUSE, CACHE_DIT):
            yield from (Variant(name=name, share=share) for share in shares)
        elif name == DYNAMIC_REUSE:
            yield from (Variant(name=name, budget=budget, share=max(shares)) for budget in budgets)
        else:
            yield Variant(name=name)
