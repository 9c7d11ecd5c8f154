"""Parts of a trajectory: FLOPs in dense evaluations, and the engines that serve its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.rivals.cache_dit_network import cached_step_cost, cost_of
from dyexport.bench.case_rows import segment_variant
from dyexport.bundle.reader import Bundle
from dyexport.bundle.spec import ModelSpec
from dyexport.flops import FlopsModel
from dyexport.report.costs import step_costs
from dyexport.report.trajectory import trajectory_of

DENSE, DIFFUSERS = "dense", "diffusers"
STEP, REUSED = "step", "reused"
EAGER, CACHED, COMPILED = "eager", "cached", "compiled"


def conditioning(steps: int) -> str:
    """Return the name of the conditioning network's run for all steps of a trajectory."""
    return f"conditioning {steps}"


def part(network: str, name: str) -> str:
    """Return the name of a timed call: an engine of a network, or one of its conditioning."""
    return f"{network}/{name}"


@dataclass(frozen=True, kw_only=True)
class Composition:
    """Cost of a trajectory in dense evaluations, and the number of calls of everything that is timed."""

    cost: float
    parts: Mapping[str, float]


def dense_composition(shares: Sequence[float]) -> Composition:
    """Compose a trajectory of the dense engine; ``shares`` of each step are computed, the rest is reused."""
    steps, computed = len(shares), sum(shares)
    parts = {part(DENSE, STEP): computed, part(DENSE, conditioning(steps)): computed / steps}
    return Composition(cost=computed, parts=_with_reuse(parts, steps - computed))


def slim_composition(name: str, bundle: Bundle, shares: Sequence[float]) -> Composition:
    """Compose a trajectory of a bundle's engines."""
    steps = len(shares)
    trajectory = trajectory_of(bundle.manifest.model, bundle.manifest.plan, steps)
    costs = step_costs(bundle, trajectory)
    parts = {part(name, conditioning(steps)): sum(shares) / steps}
    for step, share in zip(trajectory.steps, shares, strict=True):
        engine = part(name, segment_variant(step.segment))
        parts[engine] = parts.get(engine, 0.0) + share
    cost = sum(each.executed * share for each, share in zip(costs.steps, shares, strict=True))
    return Composition(cost=cost, parts=_with_reuse(parts, steps - sum(shares)))


def _with_reuse(parts: Mapping[str, float], reused: float) -> dict[str, float]:
    return {**parts, **({part(DENSE, REUSED): reused} if reused > 0 else {})}


def eager_composition(spec: ModelSpec, shares: Sequence[float]) -> Composition:
    """Compose a trajectory of diffusers' module under cache-dit."""
    flops, computed = flops_of(spec), sum(shares)
    parts = {part(DIFFUSERS, EAGER): computed, part(DIFFUSERS, CACHED): len(shares) - computed}
    return Composition(cost=cost_of(list(shares), cached_step_cost(flops)), parts=parts)


def compiled_composition(steps: int) -> Composition:
    """Compose a trajectory of diffusers' compiled module, which computes its conditioning in every step."""
    return Composition(cost=float(steps), parts={part(DIFFUSERS, COMPILED): float(steps)})


def flops_of(spec: ModelSpec) -> FlopsModel:
    return FlopsModel.of_spec(spec)
