"""Lines that several build commands print."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dyexport.console import format_bytes

if TYPE_CHECKING:
    from dyexport.bundle.plan import SegmentPlan

NARROW = 4.0  # times below the limit of fp16


def plan_costs(plan: SegmentPlan) -> dict[str, Any]:
    """Return the number of engines, FLOPs ratios and sizes of a plan."""
    return {"engines": len(plan.segments), **plan.model_dump(exclude={"segments"})}


def headroom_lines(payload: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """Return the margin to the limit of fp16, with a warning if it is narrow: calibration does not see every input."""
    if "fp16_headroom" not in payload:
        return ()
    warning = "; other inputs may overflow, use bf16 to be safe" if payload["fp16_headroom"] < NARROW else ""
    return (("largest value in fp16", f"{payload['fp16_headroom']:.1f} x below the limit{warning}"),)


def trainable_lines(payload: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """Return how many parameters are trained, if any."""
    if "trainable_parameters" not in payload:
        return ()
    count, share = payload["trainable_parameters"], payload["trainable_share"]
    return (("trained", f"{count:,.0f} parameters ({100 * share:.2f} % of full fine-tuning's)"),)


def next_lines(payload: Mapping[str, Any]) -> str:
    """Return the commands to run after a build, and the size of its work directory with how to remove it."""
    bundle, work = shlex.quote(payload["bundle"]), os.path.relpath(payload["work"])
    commands = "".join(f"\n  dyexport {name} {bundle}" for name in ("verify", "sample", "bench"))
    return (
        f"\nNext:{commands}\n\n"
        f"{work} ({format_bytes(payload['work_bytes'])}) holds the finished stages, for other builds of this model.\n"
        f"To remove it: rm -r {shlex.quote(work)}"
    )
