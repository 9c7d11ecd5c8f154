"""Compare a bundle with its dense network and the diffusers module, all timed in one run (``dyexport bench``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import torch

from dyexport.bench.case import Case, first_calls, has_dense, opened_case, overheads, step_variants
from dyexport.bench.case_rows import loop_rows, pipeline_rows, step_rows
from dyexport.bench.energy import Meter, open_meter
from dyexport.bench.environment import Conditions, Environment, conditions, describe, throttling
from dyexport.bench.latency import Blocks, time_rounds
from dyexport.bench.machine import cpu_time, taken_by_others
from dyexport.bench.memory import MemoryProbe, with_and_without_sharing
from dyexport.bench.rows import BUNDLE, DENSE, BenchReport, Row
from dyexport.bench.settings import BenchSettings
from dyexport.bundle.reader import Bundle
from dyexport.engines.registry import EngineOptions, engine_files, make_engines
from dyexport.progress import Progress, no_progress

MOST_OTHERS = 0.05  # share of CPU time

Phase = Callable[[str], AbstractContextManager[Progress]]
"""Context of a named phase of a benchmark; yields where the phase reports its progress."""


@contextmanager
def no_phase(name: str) -> Iterator[Progress]:
    """Report a phase to nobody."""
    yield no_progress


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """Results of one case."""

    rows: tuple[Row, ...]
    overheads: dict[str, float | None]
    others: float | None
    before: Conditions
    after: Conditions
    environment: Environment


def compare(bundle: Bundle, settings: BenchSettings, phase: Phase = no_phase) -> BenchReport:
    """Measure latency, overhead, memory and energy, in phases that report to ``phase``.

    Raises what ``load`` raises, and ``UsageError`` for a size or a pipeline that the model does not take.
    """
    settings.check_for(bundle)
    measured = []
    with _threads(settings.threads), torch.inference_mode():
        for index, (batch, size) in enumerate(settings.cases):
            named = _numbered(phase, index, len(settings.cases))
            with opened_case(bundle, settings, batch, size) as case, open_meter(case.device) as meter:
                measured.append(_measure(case, meter, named))
            with named("memory") as advance:
                measured[-1] = replace(measured[-1], rows=_with_memories(case, measured[-1].rows, advance))
    return _report(bundle, settings, measured)


def _measure(case: Case, meter: Meter, phase: Phase) -> _Measured:
    with phase("first calls") as advance:
        variants = step_variants(case)
        first = first_calls(variants, case.clock, advance)
    before, taken = conditions(case.device, meter.counter), cpu_time()
    with phase("timing") as advance:
        timings = time_rounds(variants, Blocks(rounds=case.settings.rounds), clock=case.clock, progress=advance)
    others, after = taken_by_others(taken, cpu_time()), conditions(case.device, meter.counter)
    rows = step_rows(case, timings, first, variants, meter)
    if case.settings.trajectory:
        with phase("whole loops") as advance:
            rows += loop_rows(case, meter, advance)
    if case.settings.pipeline is not None:
        with phase("pictures") as advance:
            rows += pipeline_rows(case, meter, advance)
    with phase("overhead"):
        outside = overheads(case)
    return _Measured(
        rows=tuple(rows),
        overheads=outside,
        others=others,
        before=before,
        after=after,
        environment=describe(case.device, torch.get_num_threads()),
    )


def _with_memories(case: Case, rows: Sequence[Row], progress: Progress) -> tuple[Row, ...]:
    measured = []
    for done, row in enumerate(rows):
        progress(done, len(rows))
        measured.append(_with_memory(case, row))
    return tuple(measured)


def _with_memory(case: Case, row: Row) -> Row:
    """Add the memory of a whole network, once for each case."""
    if row.unit != "step" or row.variant not in (*BUNDLE, DENSE):
        return row
    dense = row.variant == DENSE
    probe = MemoryProbe(
        bundle=str(case.bundle.root),
        target=row.target,
        batch=case.batch,
        threads=torch.get_num_threads(),
        share_weights=case.settings.share_weights and not dense,
        memory=None if dense else case.settings.memory,
        dense=dense,
        device=case.device,
        size=case.size,
    )
    shares, shareable = (not dense and _shares(case, row.target, asked) for asked in (probe.share_weights, True))
    return replace(row, memory=with_and_without_sharing(probe, shares=shares, shareable=shareable))


def _shares(case: Case, target: str, share_weights: bool) -> bool:
    """Return whether the engines of a target map one copy of the weights, if that is asked for or not."""
    paths = list(case.bundle.engine_paths(engine_files(target)).values())
    options = EngineOptions(device=case.device, share_weights=share_weights)
    return all(engine.shares_weights for engine in make_engines(target, paths, options))


def _report(bundle: Bundle, settings: BenchSettings, measured: Sequence[_Measured]) -> BenchReport:
    plan, model = bundle.manifest.plan, bundle.manifest.model
    shares = [each.others for each in measured if each.others is not None]
    others = max(shares, default=None)
    warnings = [warning for each in measured for warning in throttling(each.before, each.after)]
    if others is not None and others > MOST_OTHERS:
        warnings.append(f"other processes took {others:.0%} of CPU time meanwhile; torch loses most by that")
    for target in settings.targets:
        if not has_dense(bundle, target):
            warnings.append(f"the bundle has no dense network as {target}, so nothing is compared with it")
    return BenchReport(
        model=model.name,
        steps=settings.steps_for(model),
        flops_ratio=plan.flops_ratio,
        network_flops_ratio=plan.network_flops_ratio,
        executed_flops_ratio=plan.executed_flops_ratio,
        rows=tuple(row for each in measured for row in each.rows),
        switch_overhead=measured[0].overheads,
        others=others,
        before=measured[0].before,
        after=measured[-1].after,
        environment=measured[0].environment,
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _numbered(phase: Phase, index: int, cases: int) -> Phase:
    """Return phases that are named by their case, if there are several."""
    return (lambda name: phase(f"{name} of case {index + 1} of {cases}")) if cases > 1 else phase


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Set torch's number of threads inside the context; ONNX Runtime engines use the same number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
