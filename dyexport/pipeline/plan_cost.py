"""What TensorRT plans will take, told before any is built: bytes from weights, seconds from plans timed before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from dyexport.bundle.manifest import CONDITIONING
from dyexport.pipeline.ledger import Record
from dyexport.pipeline.networks import Network


@dataclass(frozen=True, kw_only=True)
class PlanCost:
    """``bytes`` are the weights of all plans, each with a copy of its own; what TensorRT adds to them is not known.

    ``seconds`` is one plan after another, going by ``timed`` plans that this work directory holds; None without any.
    """

    bytes: int
    seconds: float | None
    timed: int


def predict(target: str, networks: Sequence[Network], records: Mapping[str, Record]) -> PlanCost:
    """For the plans of one target. A segment's plan takes what segments' plans took, conditioning what its did."""
    timed = {name: r.seconds for name, r in records.items() if r.seconds is not None and name.startswith(f"{target} ")}
    once = [seconds for name, seconds in timed.items() if name.endswith(CONDITIONING)]
    each = [seconds for name, seconds in timed.items() if not name.endswith(CONDITIONING)]
    conditionings = sum(network.segment is None for network in networks)
    seconds = None
    if once and each:
        seconds = conditionings * median(once) + (len(networks) - conditionings) * median(each)
    return PlanCost(bytes=sum(network.slice.nbytes for network in networks), seconds=seconds, timed=len(timed))
