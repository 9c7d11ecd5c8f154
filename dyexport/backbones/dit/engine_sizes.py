"""Sizes of DiT's TensorRT engines: all but the batch are fixed. Imports no torch."""

from __future__ import annotations

from dyexport.bundle.plan import Segment
from dyexport.bundle.plan_info import Profile
from dyexport.bundle.spec import ModelSpec


def free_sizes(spec: ModelSpec, segment: Segment | None) -> dict[str, Profile]:
    return {}


def sorts_text(spec: ModelSpec, block: int) -> bool:
    return False
