"""What is timed: models, widths over t, the networks cut for them, and inputs of any shape. Needs no device."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import numpy as np
import torch
from torch import Tensor, nn

from dyexport.backbones.base import Preset
from dyexport.backbones.flux.preset import FluxPreset
from dyexport.bundle.plan import Segment, SegmentPlan
from dyexport.bundle.spec import ModelSpec, Precision
from dyexport.bundle.tables import TokenStats, UnitOrder, WidthTable
from dyexport.bundle.tensors import TensorSpec
from dyexport.calibration.segments import PlanSettings, make_segments, price_plan
from dyexport.errors import UsageError
from dyexport.flops import FlopsModel
from dyexport.presets import get_preset
from dyexport.slicing.slicer import (
    Slice,
    SliceContext,
    dense_segment,
    slice_conditioning,
    slice_segment,
    spec_of,
)

BUDGET = 0.5  # lambda of a case that names none
CASE = re.compile(
    r"(?P<model>[^:@]+):(?P<tokens>all|capacity):(?P<batch>[1-9]\d*)(:(?P<engines>[1-9]\d*))?(@(?P<budget>0\.\d+))?"
)
POINTS = 256  # of the width table
TREND, SPREAD, WAVES, OFFSET = 0.5, 0.1, 3, 1.5  # logits of a unit over t, as dyexport.models.random_weights has them
KEPT, SWING = 0.75, 0.1  # share of tokens that a block keeps on average, and how far it moves over t
LEVELS = np.array([0.5, 0.9, 0.99, 1.0])
ABOVE = np.array([0.0, 0.02, 0.03, 0.04])  # share of tokens that these quantiles lie above the mean


def sized_preset(text: str) -> Preset:
    """Return a preset, or with ``flux/4+8`` FLUX of 4 double and 8 single blocks. Raises ``UsageError``."""
    name, _, blocks = text.partition("/")
    preset = get_preset(name)
    if not blocks:
        return preset
    double, _, single = blocks.partition("+")
    if not isinstance(preset, FluxPreset) or not (double.isdigit() and single.isdigit()):
        raise UsageError(f"{text!r} is not a FLUX preset and its blocks, such as flux/4+8")
    return replace(preset, name=text, double_blocks=int(double), single_blocks=int(single))


@dataclass(frozen=True, kw_only=True)
class CaseName:
    """A case such as ``flux/4+8:all:1:2@0.3``: a preset, the token path, the batch, the number of engines, lambda."""

    model: str
    tokens: str
    batch: int
    engines: int
    budget: float = BUDGET

    @classmethod
    def parse(cls, text: str, engines: int = 3) -> CaseName:
        """Parse a case. Raises ``UsageError``."""
        if (found := CASE.fullmatch(text)) is None:
            raise UsageError(
                f"case {text!r} is not MODEL:all|capacity:BATCH[:ENGINES][@LAMBDA], such as dit-xl-2:all:2 or "
                "flux/4+8:all:1:2@0.3"
            )
        return cls(
            model=found["model"],
            tokens=found["tokens"],
            batch=int(found["batch"]),
            engines=int(found["engines"] or engines),
            budget=float(found["budget"] or BUDGET),
        )

    @property
    def preset(self) -> Preset:
        return sized_preset(self.model)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model's plan for a budget, and the networks that it cuts."""

    name: CaseName
    preset: Preset
    spec: ModelSpec
    widths: WidthTable
    stats: TokenStats | None
    segments: tuple[Segment, ...]

    @property
    def context(self) -> SliceContext:
        return SliceContext.of(self.spec, self.widths, self.stats)

    @cached_property
    def networks(self) -> dict[str, Slice]:
        """``conditioning``, ``segment 0`` and so on, ``dense``: modules on the meta device."""
        dense = replace(self.context, token_routers=False)
        return {
            "conditioning": slice_conditioning(self.context),
            **{f"segment {i}": slice_segment(self.context, each) for i, each in enumerate(self.segments)},
            "dense": slice_segment(dense, dense_segment(self.spec, UnitOrder.of(self.widths))),
        }

    @property
    def plan(self) -> SegmentPlan:
        return self._priced(self.segments)

    def executed_ratio(self, segment: Segment) -> float:
        """FLOPs of one engine against dense, whatever share of the trajectory it serves."""
        whole = segment.model_copy(update={"start": self.widths.start, "end": self.widths.end})
        return self._priced((whole,)).executed_flops_ratio

    def _priced(self, segments: tuple[Segment, ...]) -> SegmentPlan:
        flops = FlopsModel.of_preset(self.preset)
        return price_plan(segments, self.widths, self.stats, flops, disk_bytes=0, resident_bytes=0)

    @property
    def sizes(self) -> dict[str, int]:
        """Of every symbol in the shapes of inputs, for one step."""
        config = self.preset.transformer_config()
        side = int(str(config.get("sample_size", 0))) // int(str(config.get("patch_size", 1)))
        tokens = {"image_tokens": self.preset.tokens, "text_tokens": self.spec.text_tokens}
        return {"batch": self.name.batch, "frames": self.spec.frames or 1, "height": side, "width": side, **tokens}


def make_case(name: CaseName, precision: Precision = "bf16") -> Case:
    """Raises ``UsageError`` for a model that is not known."""
    preset = name.preset
    stats = synthetic_tokens(preset) if name.tokens == "capacity" else None
    widths = synthetic_widths(preset, name.budget, stats)
    settings = PlanSettings(engines=name.engines, token_path="auto" if stats is None else "capacity")
    kind = None if stats is None else preset.recorded(preset.token_routers[-1])
    return Case(
        name=name,
        preset=preset,
        spec=spec_of(preset, preset.transformer_config(), precision=precision, token_router=kind),
        widths=widths,
        stats=stats,
        segments=make_segments(widths, stats, FlopsModel.of_preset(preset), settings),
    )


def synthetic_widths(preset: Preset, budget: float, stats: TokenStats | None = None, seed: int = 0) -> WidthTable:
    """Units that come and go smoothly over t, as those of trained routers do, with lambda at ``budget``."""
    rng = np.random.default_rng(seed)
    start, end = preset.timestep_range
    share = (np.arange(POINTS) + 0.5) / POINTS  # (T,)
    waves = np.cos(np.pi * np.outer(share, np.arange(1, WAVES + 1)))  # (T, K)
    logits = [_logits(rng, waves, preset.depth, preset.heads) for _ in ("heads", "groups")]  # 2 x (T, L, U)
    flops = FlopsModel.of_preset(preset)
    kept = np.ones((POINTS, preset.depth)) if stats is None else stats.mean_fraction(start + share * (end - start))

    def masks(shift: float) -> list[np.ndarray]:
        return [np.concatenate([np.ones_like(each[..., :1], bool), each > -shift], axis=-1) for each in logits]

    def ratio(shift: float) -> float:
        heads, groups = (mask.mean(-1) for mask in masks(shift))
        return float(flops.flops_ratio(heads, groups, kept).mean())

    low, high = -16.0, 16.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if ratio(middle) < budget else (low, middle)
    heads, groups = masks(high)
    grid = np.linspace(start, end, POINTS, endpoint=False)
    return WidthTable(grid=grid, end=end, heads=heads, groups=groups).compressed()


def _logits(rng: np.random.Generator, waves: np.ndarray, depth: int, units: int) -> np.ndarray:
    """Of all units but the first, which is always on: (T, L, U - 1)."""
    own = SPREAD * rng.standard_normal((depth, units - 1, waves.shape[1]))  # (L, U - 1, K)
    own[..., 0] += TREND
    offsets = np.linspace(OFFSET, -OFFSET, units + 1)[1:-1]  # (U - 1,)
    return np.einsum("tk,luk->tlu", waves, own) + offsets


def synthetic_tokens(preset: Preset) -> TokenStats:
    """Every block keeps ``KEPT`` of its tokens on average, fewer at one end of the trajectory."""
    start, end = preset.timestep_range
    grid = np.linspace(start, end, 17)
    trend = KEPT + SWING * np.cos(np.pi * np.linspace(0, 1, len(grid)))  # (T,)
    share = np.repeat(trend[:, None], preset.depth, axis=1)  # (T, L)
    counts = np.ceil(np.clip(share[..., None] + ABOVE, 0, 1) * preset.tokens)  # (T, L, Q)
    return TokenStats(grid=grid, levels=LEVELS, counts=counts, mean=share * preset.tokens, tokens=preset.tokens)


def random_inputs(
    specs: tuple[TensorSpec, ...], sizes: Mapping[str, int], device: str, seed: int = 0
) -> dict[str, Tensor]:
    """Tensors of these shapes: floats are noise, gates open, integers 0 (a class, a position)."""
    generator = torch.Generator(device).manual_seed(seed)
    return {spec.name: _random(spec, sizes, generator) for spec in specs}


def _random(spec: TensorSpec, sizes: Mapping[str, int], generator: torch.Generator) -> Tensor:
    shape, dtype = tuple(_size(size, sizes) for size in spec.shape), getattr(torch, spec.dtype)
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype, device=generator.device)
    if spec.name == "width_gate":
        return torch.ones(shape, dtype=dtype, device=generator.device)
    return torch.randn(shape, dtype=dtype, device=generator.device, generator=generator)


def _size(size: int | str, sizes: Mapping[str, int]) -> int:
    """``2*height`` is twice the ``height``."""
    if isinstance(size, int):
        return size
    factor, _, symbol = size.rpartition("*")
    return int(factor or 1) * sizes[symbol]


@torch.no_grad()
def fill(module: nn.Module, device: str, seed: int = 0) -> nn.Module:
    """A module from the meta device with noise for weights, scaled so that activations stay near their size.

    Noise, not zeros: a GPU multiplies zeros faster. Made where it runs: FLUX's would take minutes on a CPU.
    """
    module = module.to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.normal_(std=max(tensor.shape, default=1) ** -0.5, generator=generator)
        else:
            tensor.zero_()
    return module


def weight_bytes(module: nn.Module) -> int:
    return sum(prod(tensor.shape) * tensor.dtype.itemsize for tensor in (*module.parameters(), *module.buffers()))
