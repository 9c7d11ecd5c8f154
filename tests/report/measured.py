"""Files of measurements as ``bench`` and ``eval`` write them, with times that are made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dyexport.bench.energy import Energy
from dyexport.bench.environment import Conditions, Environment
from dyexport.bench.rows import DENSE, DYNAMIC, BenchReport, Memory, Row, SegmentShare, payload
from dyexport.bench.statistics import Ratio, Timing
from dyexport.bundle.reader import Bundle
from dyexport.evaluation.report import Drift, EvalReport, ModelScores, PairedScores, SeedScores

MACHINE = Environment(
    device="cpu", device_name="CPU X", cpu="CPU X", threads=2, python="3.12", system="S", driver=None, versions={}
)


def timing(seconds: float) -> Timing:
    return Timing(p25=seconds, p50=seconds, p90=seconds, p99=seconds, rounds=(seconds,) * 4)


def row(variant: str, seconds: float, **rest: Any) -> Row:
    return Row(
        target="onnx",
        variant=variant,
        unit="step",
        batch=2,
        size=None,
        timing=timing(seconds),
        calls=16,
        first_call=0.1,
        samples_per_second=1 / seconds,
        energy=Energy(joules=None, reason="no counter"),
        **rest,
    )


def bench_of(bundle: Bundle, *, over_dense: Ratio | None = None) -> BenchReport:
    """Make a report of ``bench``: engine i takes i + 1 ms, the dense network 8 ms."""
    plan = bundle.manifest.plan
    engines = tuple(
        row(
            f"segment {index}",
            (index + 1) / 1000,
            segment=SegmentShare(start=segment.start, end=segment.end, share=0.5, heads=0.5, groups=0.5, tokens=1.0),
        )
        for index, segment in enumerate(plan.segments)
    )
    dynamic = row(DYNAMIC, 0.002, over_dense=over_dense, memory=Memory(resident_bytes=30_000_000, shared_bytes=None))
    return BenchReport(
        model=bundle.manifest.model.name,
        steps=50,
        flops_ratio=plan.flops_ratio,
        network_flops_ratio=plan.network_flops_ratio,
        executed_flops_ratio=plan.executed_flops_ratio,
        rows=(dynamic, row(DENSE, 0.008, memory=Memory(resident_bytes=20_000_000)), *engines),
        switch_overhead={"onnx": 0.01},
        others=0.0,
        before=Conditions(),
        after=Conditions(),
        environment=MACHINE,
        warnings=("the fan was loud",),
    )


def eval_of(bundle: Bundle) -> EvalReport:
    """Make a report of ``eval`` of two seeds, with the distances of models of digits."""
    plan = bundle.manifest.plan
    distances = {"dense": (0.1, 0.2), "dynamic": (0.3, 0.5)}
    return EvalReport(
        model=bundle.manifest.model.name,
        unit="pixels",
        conditions="labels",
        samples=1800,
        steps=50,
        guidance=1.0,
        seeds=(0, 1),
        size=None,
        target="onnx",
        flops_ratio=plan.flops_ratio,
        network_flops_ratio=plan.network_flops_ratio,
        features="digits",
        reference="digits",
        reference_samples=1438,
        classifier="digits",
        clip=None,
        frechet_real=0.44,
        models=tuple(
            ModelScores.of(name, [SeedScores(seed=i, frechet=value) for i, value in enumerate(values)])
            for name, values in distances.items()
        ),
        paired=PairedScores(
            unit="pixels",
            pairs=8,
            equal=0,
            psnr=31.5,
            psnr_lowest=20.0,
            ssim=0.97,
            ssim_lowest=0.9,
            ssim_window=7,
            data_range=1.0,
        ),
        drift=Drift(samples=8, mean=(0.1, 0.2), largest=(0.15, 0.3)),
        warnings=("few samples",),
    )


def write_bench(bundle: Bundle, path: Path) -> BenchReport:
    report = bench_of(bundle, over_dense=Ratio(value=3.25, low=3.2, high=3.3))
    path.write_text(json.dumps(payload(report)))
    return report


def write_eval(bundle: Bundle, path: Path) -> EvalReport:
    report = eval_of(bundle)
    path.write_text(json.dumps(report.as_json()))
    return report
