"""What building FLUX.1-dev takes: memory and time against depth, at the model's real width.

For each depth random bf16 shards are written as diffusers would write them, then

    dyexport build --model flux --checkpoint DIR --budget 0.5 --router ordered --finetune-steps 0 --memory 0
        --no-baseline

is run on them in a fresh process: unit importance by streamed forward and backward passes, four slim graphs,
the weight store, the bundle. Peaks are of that process: all resident pages, those of mapped files included,
which the system takes back when it wants to (VmHWM); and anonymous memory alone, which it cannot (sampled).

    python benchmarks/flux_memory.py --depths 4 8 19 --work out/flux-memory

A depth of n means n double and 2 n single blocks; 19 is FLUX.1-dev, and below 4 a model is no longer calibrated as
large ones are. The disk holds the checkpoint and the store, in which four engines of ordered widths share their bytes
and those of free widths (--router free) share little. All but the results is deleted. Writes
benchmarks/results/flux_memory_ordered.json and .md, rewritten after each depth.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from dyexport.backbones import get_adapter
from dyexport.backbones.base import Preset, UnitChoice
from dyexport.backbones.flux.preset import FluxPreset
from dyexport.bench.report import Rows, as_markdown
from dyexport.console import format_bytes
from dyexport.files import write_atomically
from dyexport.pipeline.build import build_bundle, opened
from dyexport.pipeline.settings import BuildSettings
from dyexport.presets import PRESETS
from dyexport.stages.ledger import NullListener

RESULTS = Path(__file__).parent / "results"
SHARD = 4 * 2**30
FULL = 19
PEAKS = ("peak", "anonymous")
COPIES: dict[UnitChoice, float] = {"ordered": 2.2, "free": 3.6}  # of the weights on disk: checkpoint and store
STAGES = {"static": "check", "dynamic": "attach", "calibrate": "calibrate", "weights": "store", "bundle": "bundle"}


def flux(depth: int) -> Preset:
    """FLUX.1-dev with ``depth`` double and twice as many single blocks."""
    full = PRESETS["flux"]
    assert isinstance(full, FluxPreset)
    return replace(full, name=f"flux-depth-{depth}", double_blocks=depth, single_blocks=2 * depth)


def write_shards(preset: Preset, directory: Path) -> None:
    """A diffusers directory of normal weights, each layer's scaled to keep its input's magnitude."""
    directory.mkdir(parents=True)
    config = {"_class_name": "FluxTransformer2DModel", **preset.transformer_config()}
    (directory / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        state = get_adapter(preset.backbone).build(preset.transformer_config()).state_dict()
    shapes = {name: tensor.shape for name, tensor in state.items()}
    shards = list(_in_shards(shapes))
    generator = torch.Generator().manual_seed(0)
    index = {}
    for number, names in enumerate(shards, start=1):
        file = f"diffusion_pytorch_model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: _random(name, shapes[name], generator) for name in names}, directory / file)
        index |= dict.fromkeys(names, file)
    (directory / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def _in_shards(shapes: Mapping[str, torch.Size]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + 2 * shape.numel() > SHARD:
            yield names
            names, size = [], 0
        names.append(name)
        size += 2 * shape.numel()
    yield names


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.full(shape, float(name.endswith("weight")), dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=shape[1] ** -0.5, generator=generator)


class Watch(NullListener):
    """Seconds and peaks of each stage."""

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, float]] = {}
        self.anonymous = 0

    def started(self, stage: str, why: str) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        self.anonymous = 0

    def finished(self, stage: str, seconds: float, *, reused: bool) -> None:
        self.stages[stage] = {"seconds": seconds, "peak": memory("VmHWM"), "anonymous": self.anonymous}

    @contextmanager
    def sampling(self) -> Iterator[None]:
        done = threading.Event()

        def sample() -> None:
            while not done.wait(0.05):
                self.anonymous = max(self.anonymous, memory("RssAnon"))

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def memory(kind: str) -> int:
    """An entry of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))


def build(depth: int, work: Path, router: UnitChoice, threads: int) -> None:
    """Measure in a fresh process, and print the results as JSON."""
    torch.set_num_threads(threads)
    preset, watch = flux(depth), Watch()
    settings = BuildSettings(
        model=preset,
        checkpoint=str(work / "checkpoint"),
        budget=0.5,
        router=router,
        finetune_steps=0,
        engines=4,
        baseline=False,
        precision="bf16",
        memory=0,
        out=work / "bundle",
        work=work / "bundle.work",
    )
    begin = time.perf_counter()
    with watch.sampling(), opened(settings, watch) as run:
        plan = build_bundle(run).plan
    found = {"seconds": time.perf_counter() - begin, "flops_ratio": plan.flops_ratio, "store": plan.disk_bytes}
    print(json.dumps({"stages": watch.stages, **found}))


def measure(depth: int, work: Path, router: UnitChoice, threads: int) -> dict[str, Any]:
    preset = flux(depth)
    weights = 2 * preset.parameters
    needed = int(COPIES[router] * weights)
    work.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(work).free) < needed:
        sys.exit(f"depth {depth} takes {format_bytes(needed)} of disk, {work} has {format_bytes(free)}")
    try:
        write_shards(preset, work / "checkpoint")
        own = {"--child": depth, "--work": work, "--router": router, "--threads": threads}
        command = [sys.executable, __file__, *(str(word) for option in own.items() for word in option)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    finally:
        shutil.rmtree(work)
    return {"depth": depth, "parameters": preset.parameters, "checkpoint": weights, **summary(found)}


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    stages = found["stages"]
    graphs = [values for name, values in stages.items() if name.startswith("onnx ")]
    named = {label: stages[name] for name, label in STAGES.items()}
    named["graphs"] = {kind: max(graph[kind] for graph in graphs) for kind in PEAKS}
    named["graphs"]["seconds"] = sum(graph["seconds"] for graph in graphs)
    peaks = {kind: max(values[kind] for values in named.values()) for kind in PEAKS}
    kept = {name: found[name] for name in ("seconds", "flops_ratio", "store")}
    return {**kept, **peaks, "stages": named}


def line(cases: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float]:
    """Least squares: value at no blocks, and what a double block with its two single ones adds."""
    slope, intercept = np.polyfit([case["depth"] for case in cases], [case[name] for case in cases], 1)
    return float(intercept), float(slope)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/flux-memory"))
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, FULL])
    parser.add_argument("--router", choices=get_args(UnitChoice), default="ordered")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        build(options.child, options.work, options.router, options.threads)
        return
    found: dict[str, Any] = {"threads": options.threads, "router": options.router, "cases": []}
    for depth in options.depths:
        found["cases"].append(measure(depth, options.work / str(depth), options.router, options.threads))
        write_results(options.results, found)


def write_results(folder: Path, found: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"flux_memory_{found['router']}.json"
    write_atomically(file, (json.dumps(found, indent=1) + "\n").encode())
    write_atomically(file.with_suffix(".md"), markdown(found).encode())
    print(markdown(found))


def markdown(found: Mapping[str, Any]) -> str:
    cases = found["cases"]
    rows: Rows = [
        (
            f"{case['depth']} + {2 * case['depth']}",
            f"{case['parameters'] / 1e9:.2f} B",
            *(format_bytes(case[name]) for name in ("checkpoint", "store", "peak", "anonymous")),
            f"{case['seconds'] / 60:.1f} min",
        )
        for case in cases
    ]
    stages: Rows = [
        (stage, *(f"{c['stages'][stage]['seconds']:.0f} s, {format_bytes(c['stages'][stage]['peak'])}" for c in cases))
        for stage in cases[0]["stages"]
    ]
    return (
        f"FLUX.1-dev's width, random bf16, 4 engines of {found['router']} widths, threads: {found['threads']}.\n\n"
        + as_markdown(("double + single", "weights", "checkpoint", "store", "peak RSS", "anonymous", "time"), rows)
        + "\n"
        + as_markdown(("stage: seconds, peak RSS", *(row[0] for row in rows)), stages)
        + _extrapolated(cases)
    )


def _extrapolated(cases: Sequence[Mapping[str, Any]]) -> str:
    if len(cases) < 2 or cases[-1]["depth"] >= FULL:
        return ""
    texts = []
    for name, unit in (("peak", 2**30), ("anonymous", 2**30), ("seconds", 60)):
        start, slope = (value / unit for value in line(cases, name))
        texts.append(f"{name} {start:.2f} + {slope:.3f} n = {start + slope * FULL:.1f} {'GiB' if unit > 60 else 'min'}")
    return f"\nLines through these, n being the double blocks, at n = {FULL}, extrapolated: {'; '.join(texts)}.\n"


if __name__ == "__main__":
    main()
