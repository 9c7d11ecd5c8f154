"""Times of any bundles of one model, without quality."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.rivals.costs import (
    DENSE,
    DIFFUSERS,
    EAGER,
    compiled_composition,
    dense_composition,
    part,
    slim_composition,
)
from benchmarks.rivals.measure import TARGET, Point, Seeded
from benchmarks.rivals.timing import Timings, TimingSettings, resident_bytes, time_engines
from benchmarks.rivals.variants import COMPILE, EAGER_MODULE, Variant
from dyexport.bench.case import has_dense
from dyexport.bundle.reader import Bundle
from dyexport.errors import UsageError
from dyexport.progress import Progress


def open_bundles(paths: Sequence[Path]) -> dict[str, Bundle]:
    """Open bundles by their names. Raises ``UsageError`` for those of different models."""
    bundles = {path.resolve().name: Bundle.open(path) for path in paths}
    if len(bundles) < len(paths):
        raise UsageError("two bundles have one name, by which the table tells them apart; rename one")
    first, *others = bundles.values()
    for other in others:
        if other.manifest.model.config != first.manifest.model.config:
            raise UsageError(f"{other.root} is of another model than {first.root}; give bundles of one model")
    return bundles


def time_bundles(
    bundles: dict[str, Bundle], steps: Sequence[int], settings: TimingSettings, progress: Progress
) -> tuple[list[Point], Timings]:
    """Time bundles, their dense network and diffusers' module; return what each number of steps consists of."""
    points = list(_points(bundles, steps, settings))
    needed = {name for point in points for name in point.parts}
    return points, time_engines(bundles, steps, needed, settings, progress)


def _points(bundles: Mapping[str, Bundle], steps: Sequence[int], settings: TimingSettings) -> Iterator[Point]:
    for count in steps:
        whole = [1.0] * count
        dense, compiled = dense_composition(whole), compiled_composition(count)
        yield _point(DENSE, count, dense.cost, dense.parts)
        yield _point(EAGER_MODULE, count, dense.cost, {part(DIFFUSERS, EAGER): float(count)})
        if settings.compiled:
            yield _point(COMPILE, count, compiled.cost, compiled.parts)
        for name, bundle in bundles.items():
            slim = slim_composition(name, bundle, whole)
            yield _point(name, count, slim.cost, slim.parts)


def _point(name: str, steps: int, cost: float, parts: Mapping[str, float]) -> Point:
    return Point(variant=Variant(name=name), seed=None, steps=steps, cost=cost, parts=parts)


def memory_of(bundles: dict[str, Bundle], batch: int) -> dict[Seeded, int]:
    """Return the bytes that the engines of each bundle take, and those of the dense network."""
    sizes: dict[Seeded, int | None] = {
        (name, None): resident_bytes(bundle, batch, dense=False) for name, bundle in bundles.items()
    }
    dense = next(bundle for bundle in bundles.values() if has_dense(bundle, TARGET))
    sizes[DENSE, None] = resident_bytes(dense, batch, dense=True)
    return {seeded: size for seeded, size in sizes.items() if size is not None}
