"""Requests for TensorRT plans: user settings, and a range of sizes for every dynamic dimension. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dyexport.backbones import get_engine_sizes
from dyexport.bundle.plan import Segment
from dyexport.bundle.plan_info import LARGEST_TOPK, Flavour, Profile
from dyexport.bundle.spec import ModelSpec
from dyexport.bundle.tensors import TensorSpec
from dyexport.errors import UsageError

if TYPE_CHECKING:
    from dyexport.exporters.tensorrt_plan import PlanRequest

BATCH = Profile(min=1, opt=2, max=8)  # 2 is one picture under guidance
STEPS = Profile(min=1, opt=50, max=100)  # rows of the conditioning network in one run


@dataclass(frozen=True, kw_only=True)
class TensorrtSettings:
    """User settings of TensorRT plans; the defaults suit every model.

    ``compute_capabilities`` such as '8.9' are the GPUs that TensorRT-RTX plans are built for; none: all of them.
    ``profiles`` are optimization profiles such as 'batch=1:2:8,image_tokens=1024:4096:4096'. With ``stream_weights``,
    weights that do not fit on the GPU may stay in host memory.
    """

    compute_capabilities: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ()
    stream_weights: bool = False

    def __post_init__(self) -> None:
        for text in self.compute_capabilities:
            if not re.fullmatch(r"\d+\.\d", text):
                raise UsageError(f"--compute-capability {text!r} is not one; write 8.9, or 8.6,8.9,12.0")
        parse_profiles(self.profiles)


def plan_request(
    settings: TensorrtSettings,
    flavour: Flavour,
    spec: ModelSpec,
    segment: Segment | None,
    inputs: tuple[TensorSpec, ...],
) -> PlanRequest:
    """Return the request to build one network of these ``inputs``; ``segment`` is None for a conditioning network."""
    from dyexport.exporters.tensorrt_plan import PlanRequest

    profiles = profiles_for(spec, segment, parse_profiles(settings.profiles))
    return PlanRequest(
        flavour=flavour,
        inputs=inputs,
        profiles=profiles,
        precision=spec.number_formats,
        compute_capabilities=settings.compute_capabilities,
        largest_topk=largest_topk(spec, segment, profiles),
        stream_weights=settings.stream_weights,
    )


def parse_profiles(texts: tuple[str, ...]) -> tuple[dict[str, Profile], ...]:
    """Parse optimization profiles such as ``batch=1:2:8,image_tokens=1024:4096:4096``. Raises ``UsageError``."""
    return tuple(dict(_parse_one(part) for part in text.split(",")) for text in texts)


def _parse_one(part: str) -> tuple[str, Profile]:
    symbol, equals, sizes = part.strip().partition("=")
    if not equals or not symbol:
        raise UsageError(f"--profile {part!r} is not NAME=MIN:OPT:MAX, such as batch=1:2:8")
    return symbol, Profile.parse(sizes)


def check_profiles(spec: ModelSpec, segments: Sequence[Segment], settings: TensorrtSettings) -> None:
    """Raise ``UsageError`` for a profile with a dimension that no network of a bundle has."""
    sizes: dict[str, Profile] = {}
    for segment in (None, *segments):
        sizes |= _default_sizes(spec, segment)
    for profiles in parse_profiles(settings.profiles):
        for name in profiles.keys() - sizes.keys():
            raise UsageError(f"--profile names {name!r}; {spec.name} has {', '.join(sizes)}")


def profiles_for(
    spec: ModelSpec, segment: Segment | None, requested: tuple[Mapping[str, Profile], ...]
) -> tuple[dict[str, Profile], ...]:
    """Complete optimization profiles with the model's default sizes; without any, return one of defaults.

    Dimensions that the network of this segment does not have are left out: ``check_profiles`` knows all of them.
    """
    default = _default_sizes(spec, segment)
    return tuple(default | {k: v for k, v in profiles.items() if k in default} for profiles in requested or ({},))


def largest_topk(spec: ModelSpec, segment: Segment | None, profiles: Sequence[Mapping[str, Profile]]) -> int:
    """Return the most tokens that a block of the segment may sort; blocks with more than TensorRT can sort do not.

    If text is sorted too, a profile may allow more of it than the default.
    """
    if segment is None:
        return 0
    sorts_text = get_engine_sizes(spec.backbone).sorts_text
    text = max((sizes["text_tokens"].max for sizes in profiles if "text_tokens" in sizes), default=0)
    largest = 0
    for block in segment.limited_blocks:
        default, most = (spec.text_tokens, text) if sorts_text(spec, block) else (0, 0)
        if segment.max_capacity(block) + default <= LARGEST_TOPK:
            largest = max(largest, segment.max_capacity(block) + most)
    return largest


def _default_sizes(spec: ModelSpec, segment: Segment | None) -> dict[str, Profile]:
    rows = Profile(min=1, opt=BATCH.opt * STEPS.opt, max=BATCH.max * STEPS.max)
    default = {"batch": BATCH, "rows": rows, **get_engine_sizes(spec.backbone).free_sizes(spec, segment)}
    if segment is not None and segment.slot_buckets:
        buckets = segment.slot_buckets
        default["slots"] = Profile(min=buckets[0], opt=buckets[len(buckets) // 2], max=buckets[-1])
    return default
