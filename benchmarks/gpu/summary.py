"""What times of a case's networks add up to: per engine, and over the trajectory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.gpu.cases import Case
from dyexport.bench.statistics import over_trajectory, with_conditioning

DENSE = ("dense", "diffusers")  # static models that are compiled as the slim ones are: the faster one is the measure


def summarize(case: Case, seconds: Mapping[str, float], steps: int) -> dict[str, Any]:
    """``seconds`` of one call of ``conditioning``, of every ``segment i`` and of at least one dense model."""
    each = with_conditioning(seconds, steps)
    measure = min((name for name in DENSE if name in each), key=each.__getitem__)
    plan, span = case.plan, case.widths.end - case.widths.start
    engines = [
        {
            "share": (segment.end - segment.start) / span,
            "flops_ratio": case.executed_ratio(segment),
            "seconds": each[f"segment {index}"],
            "speedup": each[measure] / each[f"segment {index}"],
            "realised": each[measure] / each[f"segment {index}"] * case.executed_ratio(segment),
        }
        for index, segment in enumerate(case.segments)
    ]
    dynamic = over_trajectory([e["share"] for e in engines], [e["seconds"] for e in engines])
    return {
        "batch": case.name.batch,
        "precision": case.spec.precision,
        "seconds": {**each, "dynamic": dynamic},
        "flops_ratio": plan.flops_ratio,
        "network_flops_ratio": plan.network_flops_ratio,
        "executed_flops_ratio": plan.executed_flops_ratio,
        "measure": measure,
        "speedups": {name: value / dynamic for name, value in each.items() if name in (*DENSE, "eager")},
        "speedup": each[measure] / dynamic,
        "realised": each[measure] / dynamic * plan.network_flops_ratio,
        "realised_of_executed": each[measure] / dynamic * plan.executed_flops_ratio,
        "engines": engines,
    }
