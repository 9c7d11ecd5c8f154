"""Segment plan of a bundle: intervals of t, and the units and tokens of the network that serves each."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from dyexport.bundle.records import Frozen
from dyexport.bundle.tables import FloatArray, TokenStats, WidthTable
from dyexport.errors import EngineMismatchError

TokenPath = Literal["all", "masked", "capacity", "dynamic", "compact"]
EVERY_TOKEN: TokenPath = "all"
ALLOCATES: TokenPath = "compact"  # the path whose tensors have sizes that only the data decides


def segment_name(index: int) -> str:
    """Return the name of a segment's network, in engines and file names."""
    return f"segment-{index:02d}"


def _distinct(units: tuple[int, ...]) -> tuple[int, ...]:
    """Require at least one unit of a block, and no duplicates."""
    if not units or len(set(units)) != len(units):
        raise ValueError(f"units {list(units)} must be at least one, and none twice")
    return units


def _ascending(sizes: tuple[int, ...]) -> tuple[int, ...]:
    if any(left >= right for left, right in pairwise(sizes)):
        raise ValueError(f"sizes {list(sizes)} must ascend")
    return sizes


Units = Annotated[tuple[NonNegativeInt, ...], AfterValidator(_distinct)]
Buckets = Annotated[tuple[PositiveInt, ...], AfterValidator(_ascending)]


class Segment(Frozen):
    """A half-open interval of t, and the slim network that serves it.

    ``heads`` and ``groups`` list, per block, the dense indices of the units in the network, in
    storage order: the union over the interval. A block
    whose mask changes inside the interval is marked in ``gated_heads`` / ``gated_groups``; its units
    are multiplied by their entries of the ``width_gate`` input.

    ``token_paths`` says how each block's MLP skips tokens: ``all`` (no token router), ``masked``
    (runs on every token, times the mask), ``capacity`` (the top ``capacities[l]`` tokens), ``dynamic``
    (the top ``capacities[l] + len(slots)`` tokens, ``slots`` being an input whose length is chosen at
    run time from ``slot_buckets``) or ``compact`` (exactly the kept tokens, for runtimes that can
    allocate by data). ``masked`` and ``compact`` are exact for every input, the other two as long as
    the kept tokens fit.

    With ``merged``, TD-LoRA is part of the weights, at the mean of its gates over the interval; otherwise
    it is a separate path, exact at every t.
    """

    start: float
    end: float
    heads: tuple[Units, ...]
    groups: tuple[Units, ...]
    gated_heads: tuple[bool, ...]
    gated_groups: tuple[bool, ...]
    token_paths: tuple[TokenPath, ...]
    capacities: tuple[NonNegativeInt, ...]
    slot_buckets: Buckets = ()
    merged: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Segment:
        depth = len(self.heads)
        lists = (self.groups, self.gated_heads, self.gated_groups, self.token_paths, self.capacities)
        if not depth or any(len(values) != depth for values in lists):
            raise ValueError("every list of a segment must have one entry per block")
        if not self.start < self.end:
            raise ValueError(f"segment [{self.start}, {self.end}) is empty")
        if ("dynamic" in self.token_paths) != bool(self.slot_buckets):
            raise ValueError("slot_buckets belong to, and only to, segments with a dynamic token path")
        return self

    @property
    def depth(self) -> int:
        return len(self.heads)

    @property
    def limited_blocks(self) -> tuple[int, ...]:
        """Blocks whose token router may keep more tokens than the capacity."""
        return tuple(block for block, path in enumerate(self.token_paths) if path in ("capacity", "dynamic"))

    def max_capacity(self, block: int) -> int:
        """Return the most tokens that a limited block can keep."""
        return self.capacities[block] + (max(self.slot_buckets) if self.token_paths[block] == "dynamic" else 0)

    @property
    def largest_capacity(self) -> int:
        """Most tokens that any limited block can keep, and the fewest of a sample; 0 without limited blocks."""
        return max((self.max_capacity(block) for block in self.limited_blocks), default=0)

    @property
    def gate_size(self) -> int:
        """Length W of the ``width_gate`` input; 0 when every mask is constant over the interval."""
        heads = sum(len(kept) for kept, gated in zip(self.heads, self.gated_heads, strict=True) if gated)
        groups = sum(len(kept) for kept, gated in zip(self.groups, self.gated_groups, strict=True) if gated)
        return heads + groups

    def width_gate(self, table: WidthTable, row: int) -> FloatArray:
        """Return the gates at one row of the table, block by block, heads before groups: (W,) float32."""
        parts = []
        for block in range(self.depth):
            if self.gated_heads[block]:
                parts.append(table.heads[row, block, list(self.heads[block])])
            if self.gated_groups[block]:
                parts.append(table.groups[row, block, list(self.groups[block])])
        return np.concatenate(parts).astype(np.float32) if parts else np.zeros(0, np.float32)

    def slots(self, stats: TokenStats, t: float) -> int:
        """Return the smallest bucket that holds the largest kept count seen near ``t`` in calibration."""
        needed = 1
        for block, highest in enumerate(stats.highest(t, t)):
            if self.token_paths[block] == "dynamic":
                needed = max(needed, int(highest) - self.capacities[block])
        return next((bucket for bucket in self.slot_buckets if bucket >= needed), self.slot_buckets[-1])


class SegmentPlan(Frozen):
    """Ordered segments that cover the whole range of t, and their predicted cost.

    FLOPs are shares of the dense model's, averaged over the trajectory: ``flops_ratio`` is the
    paper's lambda (attention and MLP only, masks as run), ``network_flops_ratio`` counts static
    layers too, ``executed_flops_ratio`` is ``network_flops_ratio`` as the graphs run
    (unions of units, token capacities, token routers).

    Bytes are of the weights of all segments and their conditioning: ``resident_bytes`` with a copy for
    each engine, ``disk_bytes`` with every stored byte once, which is also what engines that map the
    weight store hold together.

    ``merge_errors`` are the errors of merging TD-LoRA in each segment, merged or not: the squared distance of
    the output to the exact one over its squared norm, at random t. Empty if merging was not requested.
    ``quantization_errors`` are the same of quantized linear layers, fake-quantized in the masked model.
    """

    segments: tuple[Segment, ...]
    flops_ratio: NonNegativeFloat
    network_flops_ratio: NonNegativeFloat
    executed_flops_ratio: NonNegativeFloat
    disk_bytes: NonNegativeInt
    resident_bytes: NonNegativeInt
    merge_errors: tuple[NonNegativeFloat, ...] = ()
    quantization_errors: tuple[NonNegativeFloat, ...] = ()

    @model_validator(mode="after")
    def _covers(self) -> SegmentPlan:
        if not self.segments:
            raise ValueError("a plan needs at least one segment")
        for left, right in pairwise(self.segments):
            if left.end != right.start:
                raise ValueError(f"segments leave a gap or overlap at t = {left.end:g}")
            if left.depth != right.depth:
                raise ValueError(f"segments have {left.depth} and {right.depth} blocks")
        for errors in (self.merge_errors, self.quantization_errors):
            if len(errors) not in (0, len(self.segments)):
                raise ValueError(f"{len(errors)} errors are of {len(self.segments)} segments")
        return self

    @property
    def allocates(self) -> bool:
        """True if a segment skips tokens on a path that allocates by data, which some runtimes cannot."""
        return any(ALLOCATES in segment.token_paths for segment in self.segments)

    @property
    def is_static(self) -> bool:
        """True if one network without gates and token routers serves every t."""
        first = self.segments[0]
        return len(self.segments) == 1 and first.gate_size == 0 and set(first.token_paths) == {EVERY_TOKEN}

    @property
    def span(self) -> tuple[float, float]:
        """The range of t that the segments cover."""
        return self.segments[0].start, self.segments[-1].end

    def segment_for(self, t: float) -> int:
        """Return the index of the segment that serves ``t``; the end of the range belongs to the last."""
        for index, segment in enumerate(self.segments):
            if segment.start <= t < segment.end:
                return index
        if t == self.segments[-1].end:
            return len(self.segments) - 1
        span = f"[{self.segments[0].start:g}, {self.segments[-1].end:g}]"
        raise EngineMismatchError(f"timestep {t:g} is outside {span}, the range this bundle was built for")
