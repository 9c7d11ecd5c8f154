"""Sizes of DiT's TensorRT engines: all but the batch are fixed. Imports no torch."""

from __future__ import annotations

from dyexport.bundle.manifest import ModelSpec, Segment
from dyexport.bundle.plan_info import Profile


def free_sizes(spec: ModelSpec, segment: Segment | None) -> dict[str, Profile]:
    return {}


def sorts_text(spec: ModelSpec, block: int) -> bool:
    return False
