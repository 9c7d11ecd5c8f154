"""The rows of one case: denoising steps, whole sampling loops, and pictures from a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dyexport.bench.case import Case, Key, loop_variants
from dyexport.bench.end_to_end import EndToEnd
from dyexport.bench.energy import Energy, Meter
from dyexport.bench.latency import Blocks, seconds_of, time_rounds
from dyexport.bench.rows import BUNDLE, COMPILED, CONDITIONING, DENSE, EAGER, STOCK, Row, SegmentShare, Unit
from dyexport.bench.statistics import Ratio, Timing, over_trajectory, ratio, with_conditioning
from dyexport.bench.variants import Variant
from dyexport.bundle.plan import Segment
from dyexport.bundle.reader import Bundle
from dyexport.progress import Progress, no_progress

PART = Energy(joules=None, reason="measured for whole networks, not for their parts")
PIPELINE_RUNS = 3  # for the shares of text encoders and VAE


def step_rows(
    case: Case,
    timings: Mapping[Key, Timing],
    first: Mapping[Key, float],
    variants: Mapping[Key, Variant],
    meter: Meter,
) -> list[Row]:
    """Return the rows of one denoising step: for each target whole networks and engines, then diffusers' module."""
    stock = {variant: timing for (target, variant), timing in timings.items() if target == STOCK}
    loops = loop_variants(case)
    rows = []
    for target in case.opened:
        per_step = dict(_per_step(case, target, timings))
        for variant, timing in per_step.items():
            loop = loops.get((target, variant))
            rows.append(
                _row(
                    case,
                    (target, variant),
                    "step",
                    timing,
                    blocks=Blocks(rounds=case.settings.rounds),
                    first_call=first.get((target, _first_called(case) if variant in BUNDLE else variant)),
                    energy=PART if loop is None else meter.per_call(loop, case.clock).scaled(1 / case.batch),
                    segment=_segment_shares(case.bundle).get(variant),
                    **_speedups(variant, timing, per_step.get(DENSE), stock),
                )
            )
    for variant, timing in stock.items():
        energy = meter.per_call(variants[STOCK, variant], case.clock).scaled(case.steps / case.batch)
        blocks, called = Blocks(rounds=case.settings.rounds), first[STOCK, variant]
        rows.append(_row(case, (STOCK, variant), "step", timing, blocks=blocks, first_call=called, energy=energy))
    return rows


def _per_step(case: Case, target: str, timings: Mapping[Key, Timing]) -> Iterator[tuple[str, Timing]]:
    """Yield the times per step of one target's networks, the dynamic one averaged over the trajectory."""
    measured = {variant: timing for (name, variant), timing in timings.items() if name == target}
    steps = with_conditioning(measured, case.steps)
    shares = _segment_shares(case.bundle)
    yield (
        case.bundle.manifest.widths,
        over_trajectory([each.share for each in shares.values()], [steps[name] for name in shares]),
    )
    if DENSE in steps:
        yield DENSE, steps[DENSE]
    yield CONDITIONING, steps[CONDITIONING]
    yield from ((name, steps[name]) for name in shares)


def _first_called(case: Case) -> str:
    """Return the engine that sampling starts with."""
    noise, data = case.spec.noise_to_data
    return segment_variant(0 if noise < data else len(case.bundle.manifest.plan.segments) - 1)


def segment_variant(index: int) -> str:
    return f"segment {index}"


def _speedups(
    variant: str, timing: Timing, dense: Timing | None, stock: Mapping[str, Timing]
) -> dict[str, Ratio | None]:
    if variant == CONDITIONING:
        return {}
    others = {"over_dense": None if variant == DENSE else dense}
    others |= {"over_compiled": stock.get(COMPILED), "over_eager": stock.get(EAGER)}
    return {name: None if other is None else ratio(other, timing) for name, other in others.items()}


def loop_rows(case: Case, meter: Meter, progress: Progress = no_progress) -> list[Row]:
    """Time whole sampling loops of every target, and return their rows."""
    return _whole_rows(case, loop_variants(case), "trajectory", meter, progress)


def pipeline_rows(case: Case, meter: Meter, progress: Progress = no_progress) -> list[Row]:
    """Time a diffusers pipeline around every target, and return its rows, with the times of its other parts."""
    assert case.settings.pipeline is not None, "the caller has one"
    first = next(iter(case.opened.values())).loaded
    pipe = EndToEnd(first, case.settings.pipeline, batch=case.batch, size=case.size, steps=case.steps)
    transformers = {
        (target, name): network for target, opened in case.opened.items() for name, network in opened.whole.items()
    }
    variants = {key: pipe.variant(network) for key, network in transformers.items()}
    parts = {key: pipe.parts(network, case.clock, PIPELINE_RUNS) for key, network in transformers.items()}
    return _whole_rows(case, variants, "pipeline", meter, progress, parts)


def _whole_rows(
    case: Case,
    variants: Mapping[Key, Variant],
    unit: Unit,
    meter: Meter,
    progress: Progress,
    parts: Mapping[Key, Mapping[str, float]] | None = None,
) -> list[Row]:
    first = {key: seconds_of(run, case.clock) for key, run in variants.items()}
    timings = time_rounds(variants, case.loops, clock=case.clock, progress=progress)
    return [
        _row(
            case,
            (target, variant),
            unit,
            timing,
            blocks=case.loops,
            first_call=first[target, variant],
            energy=meter.per_call(variants[target, variant], case.clock).scaled(1 / case.batch),
            parts=None if parts is None else parts[target, variant],
            **_speedups(variant, timing, timings.get((target, DENSE)), {}),
        )
        for (target, variant), timing in timings.items()
    ]


def _row(case: Case, key: Key, unit: Unit, timing: Timing, *, blocks: Blocks, **rest: Any) -> Row:
    calls_per_sample = case.steps if unit == "step" else 1
    return Row(
        target=key[0],
        variant=key[1],
        unit=unit,
        batch=case.batch,
        size=case.size,
        timing=timing,
        calls=blocks.rounds * blocks.timed,
        samples_per_second=case.batch / (timing.p50 * calls_per_sample),
        **rest,
    )


def _segment_shares(bundle: Bundle) -> dict[str, SegmentShare]:
    widths = bundle.widths
    return {
        segment_variant(index): SegmentShare(
            start=segment.start,
            end=segment.end,
            share=(segment.end - segment.start) / (widths.end - widths.start),
            heads=_mean_share(segment.heads, widths.heads.shape[-1]),
            groups=_mean_share(segment.groups, widths.groups.shape[-1]),
            tokens=_kept_tokens(bundle, segment),
        )
        for index, segment in enumerate(bundle.manifest.plan.segments)
    }


def _mean_share(kept: tuple[tuple[int, ...], ...], units: int) -> float:
    return float(np.mean([len(block) / units for block in kept]))


def _kept_tokens(bundle: Bundle, segment: Segment) -> float:
    middle = (segment.start + segment.end) / 2
    return 1.0 if bundle.token_stats is None else float(bundle.token_stats.mean_fraction([middle]).mean())
