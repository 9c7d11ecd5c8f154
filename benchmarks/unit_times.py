"""CPU time of attention heads and MLP groups, next to their multiply-adds: whether FLOPs are a fair budget of time.

For each model, shallow but of its real width and with random weights, slim networks that keep half of the heads, of
the MLP groups, or of both, in some kind of block or in all, run one after the other, twice, on one thread. The time
that a half saves, over the multiply-adds that it saves, is the price of a unit; prices are ratios to that of MLP groups
of all blocks.

    python -m benchmarks.unit_times          # 10 minutes; CPU time, so other processes disturb it little

Writes benchmarks/results/unit_times.json and .md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch

from benchmarks.quality import write_results
from dyexport.backbones.base import Preset
from dyexport.bench.report import as_markdown
from dyexport.bundle.plan import Segment
from dyexport.bundle.spec import ModelSpec
from dyexport.bundle.tables import UnitOrder
from dyexport.exporters.tensorrt_profiles import profiles_for
from dyexport.flops import FlopsModel
from dyexport.presets import get_preset
from dyexport.slicing.slicer import SliceContext, dense_segment, slice_segment, spec_of

RESULTS = Path(__file__).parent / "results"
PASSES = 2  # over all networks; one is in memory at a time
WARMUP = 2  # calls of each


@dataclass(frozen=True, kw_only=True)
class Case:
    """A shallow model and, by kind, the blocks that it has."""

    model: str
    changes: Mapping[str, int]
    kinds: Mapping[str, tuple[int, ...]]
    batch: int = 1

    @property
    def preset(self) -> Preset:
        return replace(get_preset(self.model), name=f"{self.model}-shallow", **self.changes)


CASES = (
    Case(model="dit-s-2", changes={"layers": 4}, kinds={}, batch=4),
    Case(model="dit-xl-2", changes={"layers": 2}, kinds={}, batch=2),
    Case(
        model="flux",
        changes={"double_blocks": 1, "single_blocks": 2, "side": 16, "text_tokens": 128},
        kinds={"double": (0,), "single": (1, 2)},
    ),
)
"""FLUX.1 at 256 px with a quarter of its text: attention grows with the square of the tokens, so it is less there."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[case.model for case in CASES])
    parser.add_argument("--rounds", type=int, default=5, help="calls of a network in each of two passes")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cases = [case for case in CASES if case.model in (options.models or [case.model])]
    whole = {"rounds": options.rounds, "cases": [measured(case, options.rounds) for case in cases]}
    write_results(options.results / "unit_times.json", whole, markdown(whole))
    print(markdown(whole))


@torch.no_grad()
def measured(case: Case, rounds: int) -> dict[str, Any]:
    """Time the slim networks of a model in turn; return the price of each kind of unit."""
    spec = spec_of(case.preset, case.preset.transformer_config())
    flops = FlopsModel.of_spec(spec)
    units = Units.of(spec, case.preset)
    cuts = {"none": units.segment((), ())}
    for kind, blocks in ({"all": range(units.depth)} | dict(case.kinds)).items():
        cuts |= {f"{kind} heads": units.segment(blocks, ()), f"{kind} groups": units.segment((), blocks)}
        cuts[f"{kind} both"] = units.segment(blocks, blocks)
    times: dict[str, list[float]] = {name: [] for name in cuts}
    for _ in range(PASSES):
        for name, segment in cuts.items():
            times[name] += run(*network(spec, segment, units, case.batch), rounds)
    seconds = {name: median(values) for name, values in times.items()}
    costs = {name: units.cost(segment, flops) for name, segment in cuts.items()}
    prices = {
        name: (seconds["none"] - seconds[name]) / (costs["none"] - costs[name]) for name in cuts if name != "none"
    }
    gated = prices["all both"] * costs["none"]
    return {
        "model": case.model,
        "changes": dict(case.changes),
        "batch": case.batch,
        "prices": {name: price / prices["all groups"] for name, price in prices.items()},
        "gated_share_of_time": gated / seconds["none"],
    }


def run(module: Any, inputs: Sequence[torch.Tensor], rounds: int) -> list[float]:
    """Run a network; return the CPU time of each round in seconds."""
    times = []
    for _ in range(WARMUP + rounds):
        begin = process_time()
        module(*inputs)
        times.append(process_time() - begin)
    return times[WARMUP:]


@dataclass(frozen=True, kw_only=True)
class Units:
    """Counts of blocks, heads and MLP groups of a model."""

    spec: ModelSpec
    depth: int
    heads: int
    groups: int

    @classmethod
    def of(cls, spec: ModelSpec, preset: Preset) -> Units:
        return cls(spec=spec, depth=preset.depth, heads=preset.heads, groups=preset.heads)  # as published

    def segment(self, heads: Sequence[int], groups: Sequence[int]) -> Segment:
        """Return a segment with half of the heads in some blocks, and half of the groups in some."""

        def kept(units: int, blocks: Sequence[int]) -> tuple[tuple[int, ...], ...]:
            return tuple(tuple(range(units // 2 if block in blocks else units)) for block in range(self.depth))

        whole = dense_segment(self.spec, UnitOrder(heads=kept(self.heads, ()), groups=kept(self.groups, ())))
        return whole.model_copy(update={"heads": kept(self.heads, heads), "groups": kept(self.groups, groups)})

    def cost(self, segment: Segment, flops: FlopsModel) -> float:
        """Return the multiply-adds that the units of a segment cost."""
        heads = sum(flops.head_cost[block] * len(kept) for block, kept in enumerate(segment.heads)) / self.heads
        groups = sum(flops.group_cost[block] * len(kept) for block, kept in enumerate(segment.groups)) / self.groups
        return float(heads + groups)


def network(spec: ModelSpec, segment: Segment, units: Units, batch: int) -> tuple[Any, list[torch.Tensor]]:
    """Cut the network of a segment, with random weights, and make inputs for it."""
    piece = slice_segment(SliceContext(spec=spec, groups=units.groups, token_routers=False), segment)
    module, generator = piece.module.to_empty(device="cpu").eval(), torch.Generator().manual_seed(0)
    for value in (*module.parameters(), *module.buffers()):
        if value.is_floating_point():
            value.normal_(0, 0.02, generator=generator)
    (sizes,) = profiles_for(spec, segment, ())
    counts = {name: profile.opt for name, profile in sizes.items()} | {"batch": batch}
    inputs = []
    for tensor in piece.inputs:
        shape = [counts[size] if isinstance(size, str) else size for size in tensor.shape]
        inputs.append(torch.randn(shape, generator=generator).to(getattr(torch, tensor.dtype)))
    return module, inputs


def markdown(whole: Mapping[str, Any]) -> str:
    rows = [(case["model"], name, f"{price:.2f}") for case in whole["cases"] for name, price in case["prices"].items()]
    shares = ", ".join(f"{case['model']} {case['gated_share_of_time']:.2f}" for case in whole["cases"])
    return (
        "CPU time that a multiply-add takes, over that of MLP groups of all blocks (torch, one thread, fp32, shallow "
        f"models of real width). Share of the time that gates can save: {shares}.\n\n"
        + as_markdown(("model", "units", "price"), rows)
    )


if __name__ == "__main__":
    main()
