"""FLOPs of each sampling step, as the gates ask for and as the engines run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dyexport.bundle.plan import Segment
from dyexport.bundle.reader import Bundle
from dyexport.flops import FlopsModel
from dyexport.report.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Cost of the whole network at one step, as shares of the dense network's.

    ``gated`` counts the units and tokens that are on at this t, ``executed`` what the engine runs: the union of units
    over its interval, and tokens up to its capacity.
    """

    gated: float
    executed: float


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """Costs of all steps of a trajectory; ``dense`` is that of one step of the dense network, in multiply-adds."""

    steps: tuple[StepCost, ...]
    dense: float

    @property
    def executed(self) -> float:
        """Mean share over the trajectory."""
        return float(np.mean([step.executed for step in self.steps]))


def step_costs(bundle: Bundle, trajectory: Trajectory) -> StepCosts:
    """Compute the cost of each step of a trajectory."""
    spec = bundle.manifest.model
    flops = FlopsModel.of_spec(spec)
    costs = tuple(
        StepCost(gated=_gated(bundle, flops, step.t), executed=_executed(bundle, flops, step.t, step.segment))
        for step in trajectory.steps
    )
    return StepCosts(steps=costs, dense=flops.dense)


def _gated(bundle: Bundle, flops: FlopsModel, t: float) -> float:
    widths, row = bundle.widths, bundle.widths.row(t)
    heads, groups = widths.heads[row].mean(axis=-1), widths.groups[row].mean(axis=-1)  # (L,)
    routed = bundle.token_stats is not None
    ratio = float(flops.network_ratio(heads, groups, _kept(bundle, t, flops.depth), routed=routed))
    return ratio + flops.low_rank_ratio(bundle.manifest.model.td_lora)


def _executed(bundle: Bundle, flops: FlopsModel, t: float, index: int) -> float:
    segment, widths = bundle.manifest.plan.segments[index], bundle.widths
    heads = np.array([len(kept) for kept in segment.heads]) / widths.heads.shape[-1]  # (L,)
    groups = np.array([len(kept) for kept in segment.groups]) / widths.groups.shape[-1]  # (L,)
    routed = bundle.token_stats is not None
    ratio = float(flops.network_ratio(heads, groups, _computed(bundle, segment, t), routed=routed))
    return ratio + (0.0 if segment.merged else flops.low_rank_ratio(bundle.manifest.model.td_lora))


def _kept(bundle: Bundle, t: float, depth: int) -> np.ndarray:
    """Return the mean share of tokens that each block's router keeps: (L,)."""
    stats = bundle.token_stats
    return np.ones(depth) if stats is None else stats.mean_fraction([t])[0]


def _computed(bundle: Bundle, segment: Segment, t: float) -> np.ndarray:
    """Return the share of tokens that each block's MLP computes: (L,)."""
    shares, stats, kept = np.ones(segment.depth), bundle.token_stats, _kept(bundle, t, segment.depth)
    for block, path in enumerate(segment.token_paths):
        if path == "compact":
            shares[block] = kept[block]
        elif stats is not None and path in ("capacity", "dynamic"):
            slots = segment.slots(stats, t) if path == "dynamic" else 0
            shares[block] = min((segment.capacities[block] + slots) / stats.tokens, 1.0)
    return shares
