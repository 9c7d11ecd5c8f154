"""Slim against dense on one CUDA GPU, at real sizes with random weights. Prints a table; writes JSON.

    python benchmarks/gpu.py --out results.json [--cases dit-xl-2:all:2]

Compared in one run, alternating: the dense model (diffusers' module, and the slim module with every unit
kept) and the slim segments of a plan for half the FLOPs, all in bf16 under torch.compile with CUDA graphs.
The slim modules' conditioning network runs once for all steps; its share is added to each of their steps.
``realised`` is the speed-up times the share of FLOPs executed: 1.0 means that every FLOP saved is time
saved. Written but not yet run on a GPU; no published figure comes from it.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dyexport.bench.compare import with_conditioning
from dyexport.build.networks import architecture_of
from dyexport.bundle import Segment
from dyexport.calibration.segments import PlanSettings, make_segments, price_plan
from dyexport.calibration.tokens import measure_tokens
from dyexport.calibration.widths import meet_budget, read_widths
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.inputs import NoisedInputs
from dyexport.models.random_weights import random_dynamic
from dyexport.presets import PRESETS, Preset
from dyexport.slicing.flops import FlopsModel
from dyexport.slicing.recipes import Read
from dyexport.slicing.slicer import (
    Architecture,
    Slice,
    UnitOrder,
    dense_reader,
    dense_segment,
    slice_conditioning,
    slice_segment,
    spec_of,
)
from dyexport.tables import TokenStats, WidthTable

DEVICE, DTYPE = "cuda", torch.bfloat16
CASES = (
    "dit-xl-2:all:2",
    "dit-xl-2-512:all:2",
    "dit-xl-2:capacity:2",
    "dit-xl-2:all:16",
    "dit-xl-2-512:capacity:2",
    "dit-xl-2:capacity:16",
)
Run = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", default=",".join(CASES), help="MODEL:PATH:BATCH, most important first")
    parser.add_argument("--engines", type=int, default=3)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=50, help="of a trajectory, which is conditioned once")
    parser.add_argument("--seconds", type=float, default=900.0, help="start no new case after this long")
    arguments = parser.parse_args()
    started = time.monotonic()
    report: dict[str, Any] = {"machine": machine(), "cases": []}
    prepared: dict[tuple[str, str], Case] = {}
    for wanted in arguments.cases.split(","):
        name, path, batch = wanted.split(":")
        if time.monotonic() - started > arguments.seconds:
            print(f"skipped {wanted}: out of time", flush=True)
            continue
        if (name, path) not in prepared:
            prepared[name, path] = prepare(PRESETS[name], path, arguments.engines, arguments.budget)
        report["cases"].append(measure(prepared[name, path], int(batch), arguments.steps))
        torch._dynamo.reset()
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print_table(report)


def machine() -> dict[str, str]:
    import diffusers

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "diffusers": diffusers.__version__,
        "dtype": str(DTYPE),
    }


class Case:
    """A calibrated model and its plan; ``path`` 'all' leaves tokens alone (width only)."""

    def __init__(self, preset: Preset, path: str, model: DynamicTransformer) -> None:
        self.preset, self.path, self.model = preset, path, model
        self.flops = FlopsModel.of_preset(preset)
        self.spec = spec_of(preset, preset.transformer_config()).model_copy(update={"precision": "bf16"})
        self.widths: WidthTable
        self.stats: TokenStats | None = None
        self.segments: tuple[Segment, ...] = ()

    @property
    def architecture(self) -> Architecture:
        return architecture_of(self.spec, self.widths, self.stats)

    @cached_property
    def read(self) -> Read:
        routers = {f"routers.{name}": tensor for name, tensor in self.model.routers.state_dict().items()}
        state = {**self.model.backbone.state_dict(), **routers}
        return dense_reader({name: tensor.float().cpu() for name, tensor in state.items()}, self.spec)

    def load(self, piece: Slice) -> nn.Module:
        return piece.load(self.read).to(DEVICE)

    def slim(self, segment: Segment) -> nn.Module:
        return self.load(slice_segment(self.architecture, segment))

    @cached_property
    def conditioning(self) -> nn.Module:
        return self.load(slice_conditioning(self.architecture))

    def drawn(self, t: float, batch: int) -> dict[str, Tensor]:
        """Inputs of the whole model, in fp32."""
        return dict(NoisedInputs(preset=self.preset, batch_size=batch).at(t, device=DEVICE))

    def stock_inputs(self, batch: int) -> dict[str, Tensor]:
        drawn = self.drawn(sum(self.preset.timestep_range) / 2, batch)
        return {
            name: tensor.to(DTYPE if tensor.is_floating_point() else tensor.dtype) for name, tensor in drawn.items()
        }

    def inputs(self, segment: Segment, batch: int) -> dict[str, Tensor]:
        """Inputs of a slim network in the middle of its segment."""
        middle = (segment.start + segment.end) / 2
        drawn = self.drawn(middle, batch)
        modulation = self.conditioning(drawn["timestep"], drawn["class_labels"])  # (B, M)
        inputs = {"hidden_states": drawn["hidden_states"], "modulation": modulation}
        if segment.gate_size:
            gate = segment.width_gate(self.widths, self.widths.row(middle))
            inputs["width_gate"] = torch.from_numpy(gate).to(DEVICE)  # (W,)
        return inputs

    def conditions(self, batch: int, steps: int) -> dict[str, Tensor]:
        """Inputs of the conditioning network for a whole trajectory."""
        labels = self.drawn(0.0, batch)["class_labels"]  # (B,)
        t = torch.linspace(*self.preset.timestep_range, steps, device=DEVICE)  # (S,)
        return {"timestep": t.repeat_interleave(batch), "class_labels": labels.repeat(steps)}

    def executed_ratio(self, segment: Segment) -> float:
        whole = segment.model_copy(update={"start": self.widths.start, "end": self.widths.end})
        plan = price_plan((whole,), self.widths, self.stats, self.flops, disk_bytes=0, resident_bytes=0)
        return plan.executed_flops_ratio


def prepare(preset: Preset, path: str, engines: int, budget: float) -> Case:
    """Random weights, calibrated to the budget. Calibration runs on the GPU in fp32."""
    tokens = path != "all"
    case = Case(preset, path, random_dynamic(preset, tokens=tokens).to(DEVICE))
    inputs = NoisedInputs(preset=preset, batch_size=2)
    meet_budget(case.model, inputs, budget, case.flops)
    case.widths = read_widths(case.model, preset.timestep_range)
    case.stats = measure_tokens(case.model, inputs, points=8, draws=1) if tokens else None
    settings = PlanSettings(engines=engines, token_path="capacity" if tokens else "auto")
    case.segments = make_segments(case.widths, case.stats, case.flops, settings)
    return case


@torch.no_grad()
def measure(case: Case, batch: int, steps: int) -> dict[str, Any]:
    """Time all variants in alternating blocks; times are seconds per step, medians of blocks' medians."""
    dense = dense_segment(case.spec, UnitOrder.of(case.widths))
    stock = copy.deepcopy(case.model.backbone).to(DTYPE)
    runs: dict[str, Run] = {"eager": stock_run(stock, case.stock_inputs(batch))}
    runs["diffusers"] = graphed(lambda **kw: stock(**kw).sample, case.stock_inputs(batch))
    runs["conditioning"] = graphed(case.conditioning, case.conditions(batch, steps))
    runs["dense"] = graphed(case.slim(dense), case.inputs(dense, batch))
    for index, segment in enumerate(case.segments):
        runs[f"segment-{index}"] = graphed(case.slim(segment), case.inputs(segment, batch))
    return summarise(case, batch, with_conditioning(time_blocks(runs), steps))


def stock_run(stock: nn.Module, inputs: dict[str, Tensor]) -> Run:
    return lambda: stock(**inputs)


def graphed(function: Callable[..., Any], inputs: dict[str, Tensor]) -> Run:
    """Compile, then capture into one CUDA graph that reads its inputs in place."""
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            compiled(**inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compiled(**inputs)
    return graph.replay


def time_blocks(runs: dict[str, Run], rounds: int = 10, repeats: int = 20) -> dict[str, float]:
    """Median seconds of one run; every variant is timed in each round, so all see the same clock."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(repeats):
                run()
            end.record()
            torch.cuda.synchronize()
            samples[name].append(start.elapsed_time(end) / 1e3 / repeats)
    return {name: statistics.median(values) for name, values in samples.items()}


def summarise(case: Case, batch: int, seconds: dict[str, float]) -> dict[str, Any]:
    span = case.widths.end - case.widths.start
    rows, dynamic, executed = [], 0.0, 0.0
    for index, segment in enumerate(case.segments):
        share = (segment.end - segment.start) / span
        ratio = case.executed_ratio(segment)
        speedup = seconds["dense"] / seconds[f"segment-{index}"]
        dynamic += share * seconds[f"segment-{index}"]
        executed += share * ratio
        rows.append({"share": share, "executed_flops_ratio": ratio, "speedup": speedup, "realised": speedup * ratio})
    plan = price_plan(case.segments, case.widths, case.stats, case.flops, disk_bytes=0, resident_bytes=0)
    case_report = {
        "model": case.preset.name,
        "tokens": case.path,
        "batch": batch,
        "seconds": seconds,
        "flops_ratio": plan.flops_ratio,
        "network_flops_ratio": plan.network_flops_ratio,
        "executed_flops_ratio": executed,
        "speedup_vs_dense": seconds["dense"] / dynamic,
        "speedup_vs_diffusers_compiled": seconds["diffusers"] / dynamic,
        "speedup_vs_eager": seconds["eager"] / dynamic,
        "realised_of_executed": seconds["dense"] / dynamic * executed,
        "realised": seconds["dense"] / dynamic * plan.network_flops_ratio,
        "segments": rows,
    }
    print_case(case_report)
    return case_report


def print_case(case: dict[str, Any]) -> None:
    keys = ("network_flops_ratio", "executed_flops_ratio", "speedup_vs_dense", "speedup_vs_diffusers_compiled")
    figures = "  ".join(f"{key} {case[key]:.3f}" for key in (*keys, "speedup_vs_eager", "realised_of_executed"))
    print(f"{case['model']} tokens={case['tokens']} batch={case['batch']}  {figures}", flush=True)


def print_table(report: dict[str, Any]) -> None:
    print(json.dumps(report["machine"]))
    for case in report["cases"]:
        print_case(case)


if __name__ == "__main__":
    main()
