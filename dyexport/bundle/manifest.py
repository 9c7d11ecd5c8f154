"""What a bundle's manifest says: its model, its segments, its engines, the hash of every file."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from dyexport.bundle.tables import FloatArray, TokenStats, WidthTable
from dyexport.errors import EngineMismatchError
from dyexport.lora import LoraSpec

SCHEMA_VERSION = 3

CONDITIONING = "conditioning"
DENSE = "dense"
DENSE_CONDITIONING = "dense-conditioning"  # absent where the static model's is the dynamic one's

TokenPath = Literal["all", "masked", "capacity", "dynamic", "compact"]


def segment_name(index: int) -> str:
    """The network of a segment, as engines and their files are called."""
    return f"segment-{index:02d}"


def _inside(path: str) -> str:
    """A relative path that cannot leave the bundle."""
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or any(letter in path for letter in "\\:\0"):
        raise ValueError(f"{path!r} points outside the bundle")
    return path


BundlePath = Annotated[str, AfterValidator(_inside)]


def _distinct(units: tuple[int, ...]) -> tuple[int, ...]:
    """Units of a block, of which there is at least one and none twice."""
    if not units or len(set(units)) != len(units):
        raise ValueError(f"units {list(units)} must be at least one, and none twice")
    return units


def _ascending(sizes: tuple[int, ...]) -> tuple[int, ...]:
    if any(left >= right for left, right in pairwise(sizes)):
        raise ValueError(f"sizes {list(sizes)} must ascend")
    return sizes


Units = Annotated[tuple[NonNegativeInt, ...], AfterValidator(_distinct)]
Buckets = Annotated[tuple[PositiveInt, ...], AfterValidator(_ascending)]


class Frozen(BaseModel):
    """Base of what is read from disk: immutable, and unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def first_problem(error: ValidationError) -> str:
    """Where and what is wrong in something read from disk, in short."""
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


class Segment(Frozen):
    """A half-open interval of t, and the slim network that serves it.

    ``heads`` and ``groups`` list, per block, the dense indices of the units that are physically
    there, in the order in which they stand in the weights: the union over the interval. A block
    whose mask changes inside the interval is marked in ``gated_heads`` / ``gated_groups``; its units
    are multiplied by their entries of the ``width_gate`` input.

    ``token_paths`` says how each block's MLP skips tokens: ``all`` (no token router), ``masked``
    (runs on every token, times the mask), ``capacity`` (the top ``capacities[l]`` tokens), ``dynamic``
    (the top ``capacities[l] + len(slots)`` tokens, ``slots`` being an input whose length is chosen at
    run time from ``slot_buckets``) or ``compact`` (exactly the kept tokens, for runtimes that can
    allocate by data). ``masked`` and ``compact`` are exact for every input, the other two as long as
    the kept tokens fit.

    ``merged`` says that TD-LoRA is part of the weights, at the mean of its gates over the interval; else
    it has a path of its own, exact at every t.
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
        """Blocks whose token router may want more tokens than there is room for."""
        return tuple(block for block, path in enumerate(self.token_paths) if path in ("capacity", "dynamic"))

    def max_capacity(self, block: int) -> int:
        """Most tokens that a limited block may be asked to keep."""
        return self.capacities[block] + (max(self.slot_buckets) if self.token_paths[block] == "dynamic" else 0)

    @property
    def largest_capacity(self) -> int:
        """Most tokens that any limited block may be asked to keep; a sample must have as many. 0 without such."""
        return max((self.max_capacity(block) for block in self.limited_blocks), default=0)

    @property
    def gate_size(self) -> int:
        """Length W of the ``width_gate`` input; 0 when every mask is constant over the interval."""
        heads = sum(len(kept) for kept, gated in zip(self.heads, self.gated_heads, strict=True) if gated)
        groups = sum(len(kept) for kept, gated in zip(self.groups, self.gated_groups, strict=True) if gated)
        return heads + groups

    def width_gate(self, table: WidthTable, row: int) -> FloatArray:
        """The gates at one row of the table, block by block, heads before groups: (W,) float32."""
        parts = []
        for block in range(self.depth):
            if self.gated_heads[block]:
                parts.append(table.heads[row, block, list(self.heads[block])])
            if self.gated_groups[block]:
                parts.append(table.groups[row, block, list(self.groups[block])])
        return np.concatenate(parts).astype(np.float32) if parts else np.zeros(0, np.float32)

    def slots(self, stats: TokenStats, t: float) -> int:
        """The smallest bucket that holds the largest kept count seen near ``t`` in calibration."""
        needed = 1
        for block, highest in enumerate(stats.highest(t, t)):
            if self.token_paths[block] == "dynamic":
                needed = max(needed, int(highest) - self.capacities[block])
        return next((bucket for bucket in self.slot_buckets if bucket >= needed), self.slot_buckets[-1])


class SegmentPlan(Frozen):
    """Ordered segments that cover the whole range of t, and what they are predicted to cost.

    FLOPs are shares of the dense model's, averaged over the trajectory: ``flops_ratio`` is the
    paper's lambda (attention and MLP only, masks as run), ``network_flops_ratio`` counts static
    layers too, ``executed_flops_ratio`` is ``network_flops_ratio`` with what the graphs really run
    (unions of units, token capacities, token routers).

    Bytes are of the weights of all segments and their conditioning: ``resident_bytes`` with a copy for
    each engine, ``disk_bytes`` with every stored byte once, which is also what engines that map the
    weight store hold together.

    ``merge_errors`` are what merging TD-LoRA costs in each segment, merged or refused: the squared distance of
    the output to the exact one over its squared norm, at random t. Empty where merging was not asked for.
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
    def span(self) -> tuple[float, float]:
        """The range of t that the segments cover."""
        return self.segments[0].start, self.segments[-1].end

    def segment_for(self, t: float) -> int:
        """Index of the segment that serves ``t``; the end of the range belongs to the last."""
        for index, segment in enumerate(self.segments):
            if segment.start <= t < segment.end:
                return index
        if t == self.segments[-1].end:
            return len(self.segments) - 1
        span = f"[{self.segments[0].start:g}, {self.segments[-1].end:g}]"
        raise EngineMismatchError(f"timestep {t:g} is outside {span}, the range this bundle was built for")


Precision = Literal["fp32", "fp16", "bf16"]
Quantization = Literal["int8", "fp8"]  # fp8 is E4M3: four bits of exponent, three of mantissa


class ModelSpec(Frozen):
    """What a pipeline needs to know of the model; ``config`` is its diffusers configuration.

    ``latent_shape`` is of one sample as the network takes it: (C, H, W), (C, F, H, W) of a video, (N, C) packed.
    ``precision`` is that of weights and products; inputs and outputs of a network are in fp32. With
    ``quantization`` the linear layers of attention and MLP have weights and inputs in eight bits.
    """

    name: str
    backbone: str
    objective: Literal["ddpm", "flow", "flow-sigma"]
    timestep_range: tuple[float, float]
    latent_shape: tuple[PositiveInt, ...]
    tokens: PositiveInt  # that a router may skip
    text_tokens: NonNegativeInt = 0
    classes: NonNegativeInt
    pixel_space: bool
    config: dict[str, Any]
    precision: Precision = "fp32"
    quantization: Quantization | None = None
    td_lora: LoraSpec | None = None  # whose gates the conditioning network computes
    hub_id: str | None = None  # repository that the model came from, with its text encoders and VAE

    @property
    def number_formats(self) -> str:
        """For people: ``fp16, linear layers in int8``."""
        suffix = "" if self.quantization is None else f", linear layers in {self.quantization}"
        return f"{self.precision}{suffix}"

    @property
    def noise_to_data(self) -> tuple[float, float]:
        """The ends of ``timestep_range`` in the order in which sampling visits them."""
        start, end = self.timestep_range
        return (start, end) if self.objective == "flow" else (end, start)

    @property
    def frames(self) -> int | None:
        """Number of frames of a video; None for a model of pictures."""
        return self.latent_shape[1] if len(self.latent_shape) == 4 else None


class EngineRecord(Frozen):
    """One engine file. ``network`` is a segment's name, ``conditioning``, ``dense`` or ``dense-conditioning``."""

    target: str
    network: str
    path: BundlePath


class Reference(Frozen):
    """The masked torch model the bundle was cut from, for ``dyexport verify``."""

    path: str
    sha256: str


class FileRecord(Frozen):
    sha256: str
    bytes: NonNegativeInt


class Manifest(Frozen):
    schema_version: int
    dyexport_version: str
    model: ModelSpec
    budget: Annotated[float, Field(gt=0, le=1)] | None
    plan: SegmentPlan
    engines: tuple[EngineRecord, ...]
    reference: Reference | None
    metrics: dict[str, float]
    files: dict[BundlePath, FileRecord]

    @model_validator(mode="after")
    def _complete(self) -> Manifest:
        if self.plan.span != self.model.timestep_range:
            raise ValueError(f"the plan covers {self.plan.span} of the range {self.model.timestep_range}")
        for segment in self.plan.segments:
            if segment.capacities and max(segment.capacities) > self.model.tokens:
                raise ValueError(f"a capacity of {max(segment.capacities)} is more than {self.model.tokens} tokens")
        problem = next(self._engine_problems(), None)
        if problem is not None:
            raise ValueError(problem)
        return self

    def _engine_problems(self) -> Iterator[str]:
        known = {segment_name(index) for index in range(len(self.plan.segments))}
        known |= {CONDITIONING, DENSE, DENSE_CONDITIONING}
        seen: set[tuple[str, str] | str] = set()
        for engine in self.engines:
            if engine.path not in self.files:
                yield f"{engine.path} has no hash"
            if engine.network not in known:
                yield f"{engine.path} is of {engine.network!r}, which is not in the plan"
            if (engine.target, engine.network) in seen:
                yield f"{engine.target!r} has two engines of {engine.network!r}"
            if engine.path in seen:
                yield f"{engine.path} is the engine of two networks"
            seen |= {(engine.target, engine.network), engine.path}
