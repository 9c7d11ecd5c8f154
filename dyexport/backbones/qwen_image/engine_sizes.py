"""Sizes of Qwen-Image's TensorRT engines: the tokens of the text and of the picture. Imports no torch."""

from __future__ import annotations

from dyexport.bundle.plan import Segment
from dyexport.bundle.plan_info import SMALLEST, Profile
from dyexport.bundle.spec import ModelSpec


def free_sizes(spec: ModelSpec, segment: Segment | None) -> dict[str, Profile]:
    """Return the range of the tokens of a prompt, and of a picture with at least as many tokens as a block keeps."""
    kept = segment.largest_capacity if segment is not None else 0
    return {
        "text_tokens": Profile.up_to(spec.text_tokens),
        "image_tokens": Profile.up_to(spec.tokens, least=max(spec.tokens // SMALLEST, kept)),
    }


def sorts_text(spec: ModelSpec, block: int) -> bool:
    """Return False: text is a separate stream in every block."""
    return False
