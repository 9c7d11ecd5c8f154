"""Networks cut from a small model, and what they are called with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from dyexport.backbones.base import Inputs, Preset
from dyexport.bundle.manifest import ModelSpec, Segment
from dyexport.bundle.tables import TokenStats, WidthTable
from dyexport.models.dynamic import DynamicTransformer
from dyexport.slicing.recipes import Read
from dyexport.slicing.slicer import Slice, SliceContext, dense_reader, slice_conditioning, slice_segment
from tests.factories import spec_of


@dataclass(frozen=True)
class Cutter:
    """Cuts a masked model into networks that share its weights."""

    model: DynamicTransformer
    preset: Preset

    @cached_property
    def spec(self) -> ModelSpec:
        spec = None if self.model.td_lora is None else self.model.td_lora.spec
        return spec_of(self.preset).model_copy(update={"td_lora": spec})

    @cached_property
    def context(self) -> SliceContext:
        return SliceContext(spec=self.spec, groups=self.model.groups, token_routers=True)

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
        """A slim network's inputs for those of the masked model, the routed ones aside."""
        given = dict(inputs)
        conditions = [given.pop(spec.name) for spec in slice_conditioning(self.context).inputs]
        if self.spec.backbone == "latte":
            conditions = [conditions[0][:1]]  # samples share it
        return {**given, "modulation": self.conditioning(*conditions)}


def routed_inputs(segment: Segment, widths: WidthTable, stats: TokenStats, t: float) -> dict[str, torch.Tensor]:
    routed = {}
    if segment.gate_size:
        routed["width_gate"] = torch.from_numpy(segment.width_gate(widths, widths.row(t)))
    if segment.slot_buckets:
        routed["slots"] = torch.zeros(segment.slots(stats, t))
    return routed


def fits(segment: Segment, wanted: torch.Tensor, slots: int) -> bool:
    """Whether the tokens (B, L) that routers want have room."""
    limited = list(segment.limited_blocks)
    room = torch.tensor(segment.capacities)[limited] + torch.tensor(
        [slots if segment.token_paths[block] == "dynamic" else 0 for block in limited]
    )
    return not bool((wanted[:, limited] > room).any())
