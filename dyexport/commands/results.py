"""Lines that several build commands print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dyexport.bundle.manifest import SegmentPlan

NARROW = 4.0  # times below the limit of fp16


def plan_costs(found: SegmentPlan) -> dict[str, Any]:
    values = found.model_dump(exclude={"segments"})
    return {"engines": len(found.segments), **values}


def headroom_lines(payload: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """Calibration does not see every input: a narrow margin is worth a warning."""
    if "fp16_headroom" not in payload:
        return ()
    warning = "; an input not seen may overflow, bf16 will not" if payload["fp16_headroom"] < NARROW else ""
    return (("largest value in fp16", f"{payload['fp16_headroom']:.1f} x below the limit{warning}"),)


def trainable_lines(payload: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    if "trainable_parameters" not in payload:
        return ()
    count, share = payload["trainable_parameters"], payload["trainable_share"]
    return (("trained", f"{count:,.0f} parameters ({100 * share:.2f} % of full fine-tuning's)"),)
