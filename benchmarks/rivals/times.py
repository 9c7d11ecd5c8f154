"""Times and memory of a study's engines, kept in its work directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from benchmarks.quality import Store, reported
from benchmarks.rivals.measure import TARGET, Models, Point, Seeded, timed_name
from benchmarks.rivals.timing import Timings, TimingSettings, resident_bytes, time_engines
from benchmarks.rivals.variants import DENSE
from dyexport.bench.case import has_dense
from dyexport.bench.statistics import Timing
from dyexport.bundle.reader import Bundle
from dyexport.console import StageLines
from dyexport.files import write_atomically
from dyexport.stages.file_records import digest_of

TIMES = "times.json"  # in the work directory


def measured_times(
    work: Path, models: Models, points: Sequence[Point], settings: TimingSettings, lines: StageLines, *, again: bool
) -> Timings | None:
    """Time what trajectories consist of; unless ``again``, return the last run's times of the same parts, or None."""
    steps = sorted({point.steps for point in points})
    needed = sorted({name for point in points for name in point.parts})
    digests = {timed_name(*seeded): model.digest for seeded, model in models.trained.items() if model.manifest}
    key = digest_of([digests, steps, needed, asdict(settings), torch.get_num_threads()])
    if not again:
        return read_times(work / TIMES, key)
    with reported(lines, "times") as advance:
        timings = time_engines(models.bundles, steps, needed, settings, advance)
    write_times(work / TIMES, key, timings)
    return timings


def write_times(file: Path, key: str, timings: Timings) -> None:
    write_atomically(file, (json.dumps({"key": key, "timings": asdict(timings)}, indent=1) + "\n").encode())


def read_times(file: Path, key: str) -> Timings | None:
    """Read times back if they are of this key."""
    if not file.exists() or (stored := json.loads(file.read_text()))["key"] != key:
        return None
    values = stored["timings"]
    parts = {name: Timing(**{**each, "rounds": tuple(each["rounds"])}) for name, each in values["parts"].items()}
    return Timings(batch=values["batch"], parts=parts, others=values["others"])


def measured_memory(work: Path, models: Models, batch: int, lines: StageLines) -> dict[Seeded, int]:
    """Return the bytes of each model's engines, each measured once; the dense network's under its name."""
    store, found = Store(work / "memory"), {}
    probes: dict[Seeded, tuple[str, Bundle, bool]] = {}
    for seeded, model in models.trained.items():
        if model.manifest is not None:
            bundle = models.bundles[timed_name(*seeded)]
            probes[seeded] = (model.digest, bundle, False)
            if has_dense(bundle, TARGET):
                assert models.static is not None, "others are trained from it"
                probes[DENSE, None] = (models.static.digest, bundle, True)
    with reported(lines, "memory") as advance:
        for done, (seeded, (digest, bundle, dense)) in enumerate(probes.items()):
            advance(done, len(probes))
            key = digest_of([digest, batch, torch.get_num_threads(), dense])
            size = store.read(key, partial(_memory, bundle, batch, dense))["bytes"]
            if size is not None:
                found[seeded] = size
    return found


def _memory(bundle: Bundle, batch: int, dense: bool) -> dict[str, int | None]:
    return {"bytes": resident_bytes(bundle, batch, dense=dense)}
