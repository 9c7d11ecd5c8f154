"""Networks cut from a small model, and what they are called with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from dyexport.backbones.base import Inputs, Preset
from dyexport.bundle.plan import Segment
from dyexport.bundle.spec import ModelSpec, Precision, Quantization
from dyexport.bundle.tables import TokenStats, WidthTable
from dyexport.models.dynamic import DynamicTransformer
from dyexport.slicing import slicer
from dyexport.slicing.recipes import Read
from dyexport.slicing.slicer import (
    Slice,
    SliceContext,
    UnitOrder,
    dense_reader,
    dense_segment,
    slice_conditioning,
    slice_segment,
)


@dataclass(frozen=True)
class Cutter:
    """Cuts a masked model into networks that share its weights."""

    model: DynamicTransformer
    preset: Preset
    precision: Precision = "fp32"
    quantization: Quantization | None = None
    token_routers: bool = True

    @cached_property
    def spec(self) -> ModelSpec:
        return slicer.spec_of(
            self.preset,
            self.preset.transformer_config(),
            None if self.model.td_lora is None else self.model.td_lora.spec,
            self.precision,
            self.quantization,
            self.preset.recorded(self.model.token_router),
        )

    @cached_property
    def context(self) -> SliceContext:
        return SliceContext(spec=self.spec, groups=self.model.groups, token_routers=self.token_routers)

    @cached_property
    def read(self) -> Read:
        return dense_reader(self.model.all_weights(), self.spec)

    def cut(self, segment: Segment) -> Slice:
        return slice_segment(self.context, segment)

    def load(self, segment: Segment) -> torch.nn.Module:
        return self.cut(segment).load(self.read)

    @cached_property
    def conditioning(self) -> torch.nn.Module:
        return slice_conditioning(self.context).load(self.read)

    def inputs(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """A slim network's inputs for those of the masked model, without those that follow from t."""
        rest = dict(inputs)
        conditions = {spec.name: rest.pop(spec.name) for spec in slice_conditioning(self.context).inputs}
        if self.shares_modulation:
            conditions = {name: value[:1] for name, value in conditions.items()}
        return {**rest, "modulation": self.conditioning(**conditions)}

    @cached_property
    def dense_segment(self) -> Segment:
        """Every head, group and token at every t."""
        model = self.model
        heads, groups = tuple(range(model.heads)), tuple(range(model.groups))
        return dense_segment(self.spec, UnitOrder(heads=(heads,) * model.depth, groups=(groups,) * model.depth))

    @cached_property
    def dense(self) -> Slice:
        return self.cut(self.dense_segment)

    @cached_property
    def shares_modulation(self) -> bool:
        """Whether all samples have one row of modulation."""
        return next(spec.shape[0] == 1 for spec in self.dense.inputs if spec.name == "modulation")


def routed_inputs(segment: Segment, widths: WidthTable, stats: TokenStats, t: float) -> dict[str, torch.Tensor]:
    routed = {}
    if segment.gate_size:
        routed["width_gate"] = torch.from_numpy(segment.width_gate(widths, widths.row(t)))
    if segment.slot_buckets:
        routed["slots"] = torch.zeros(segment.slots(stats, t))
    return routed


def fits(segment: Segment, kept: torch.Tensor, slots: int) -> bool:
    """Return whether the tokens (B, L) that routers keep fit into the capacities."""
    limited = list(segment.limited_blocks)
    capacity = torch.tensor(segment.capacities)[limited] + torch.tensor(
        [slots if segment.token_paths[block] == "dynamic" else 0 for block in limited]
    )
    return not bool((kept[:, limited] > capacity).any())


def assert_kept(segment: Segment, kept: list[torch.Tensor], tokens: torch.Tensor) -> None:
    """Counts (B, R) are of the blocks whose capacity is limited, and absent where there is none."""
    counted = tokens.sum(-1).to(torch.int64)[:, list(segment.limited_blocks)]
    assert len(kept) == bool(segment.limited_blocks)
    assert all(torch.equal(counts, counted) for counts in kept)
