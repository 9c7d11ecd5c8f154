"""Sizes of FLUX's TensorRT engines: numbers of text and image tokens. Imports no torch."""

from __future__ import annotations

from math import isqrt

from dyexport.bundle.plan import Segment
from dyexport.bundle.plan_info import Profile, smallest_side
from dyexport.bundle.spec import ModelSpec


def free_sizes(spec: ModelSpec, segment: Segment | None) -> dict[str, Profile]:
    """Return the ranges of text tokens and image tokens; no image has fewer tokens than a block keeps."""
    kept = segment.largest_capacity if segment is not None else 0
    return {
        "text_tokens": Profile.up_to(spec.text_tokens),
        "image_tokens": Profile.up_to(spec.tokens, least=max(smallest_side(isqrt(spec.tokens)) ** 2, kept)),
    }


def sorts_text(spec: ModelSpec, block: int) -> bool:
    """Return True for a single block: its sequence has text and image tokens, and it keeps all of the text."""
    return block >= int(spec.config["num_layers"])
