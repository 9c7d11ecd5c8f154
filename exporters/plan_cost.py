"""Cost estimates of TensorRT plans: bytes from the weights, build seconds from earlier plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from dyexport.bundle.manifest import CONDITIONING


@dataclass(frozen=True, kw_only=True)
class PlanCost:
    """Estimated cost of the plans of one target.

    ``bytes`` counts the weights of every plan; TensorRT adds an unknown amount. ``seconds`` is for building one plan
    after another, estimated from the ``timed`` plans that were built before; None if there are too few of them.
    """

    bytes: int
    seconds: float | None
    timed: int


def estimate_plans(weights: Mapping[str, int], build_seconds: Mapping[str, float]) -> PlanCost:
    """Estimate the plans of one target.

    ``weights`` are the bytes of each network's weights, ``build_seconds`` the times of earlier plans, both by network.
    A segment's plan is assumed to take the median of the segments' plans, and likewise for conditioning.
    """
    conditioning = [seconds for name, seconds in build_seconds.items() if name.endswith(CONDITIONING)]
    segments = [seconds for name, seconds in build_seconds.items() if not name.endswith(CONDITIONING)]
    conditioning_count = sum(name.endswith(CONDITIONING) for name in weights)
    seconds = None
    if conditioning and segments:
        segment_count = len(weights) - conditioning_count
        seconds = conditioning_count * median(conditioning) + segment_count * median(segments)
    return PlanCost(bytes=sum(weights.values()), seconds=seconds, timed=len(build_seconds))
