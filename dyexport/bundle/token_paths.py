"""Token paths that a target cannot run, on any machine."""

from __future__ import annotations

from dyexport.bundle.plan import ALLOCATES, SegmentPlan
from dyexport.bundle.reader import Bundle
from dyexport.bundle.targets import TARGETS
from dyexport.errors import TargetError


def token_path_refusal(plan: SegmentPlan, target: str) -> str | None:
    """Explain why a target cannot run the networks of a plan on any machine; None if it can."""
    described = TARGETS.get(target)  # None: a runtime that a user registered
    if described is None or not described.static_tokens or not plan.allocates:
        return None
    return (
        f"skips tokens on the path {ALLOCATES!r}, which allocates by data, and {target} cannot; "
        "build the bundle with --token-path dynamic"
    )


def check_token_path(bundle: Bundle, target: str) -> None:
    """Raise ``TargetError`` for a target that cannot run the networks of a bundle on any machine."""
    if (refusal := token_path_refusal(bundle.manifest.plan, target)) is not None:
        raise TargetError(f"{bundle.root} {refusal}, or use target 'onnx'")
