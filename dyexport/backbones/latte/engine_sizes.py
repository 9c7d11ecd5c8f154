"""Sizes of Latte's TensorRT engines: the tokens of the text, frames, height and width. Imports no torch."""

from __future__ import annotations

from dyexport.bundle.plan import Segment
from dyexport.bundle.plan_info import Profile, smallest_side
from dyexport.bundle.spec import ModelSpec


def free_sizes(spec: ModelSpec, segment: Segment | None) -> dict[str, Profile]:
    """Return the ranges of text, frames and sides in patches; only the text varies where capacities are of a clip."""
    frames, side = int(spec.config["video_length"]), int(spec.config["sample_size"]) // int(spec.config["patch_size"])
    fixed = segment is not None and segment.largest_capacity > 0
    return {
        "text_tokens": Profile.up_to(spec.text_tokens),
        "frames": Profile.up_to(frames, least=frames if fixed else 1),
        **{name: Profile.up_to(side, least=side if fixed else smallest_side(side)) for name in ("height", "width")},
    }


def sorts_text(spec: ModelSpec, block: int) -> bool:
    return False
