"""Host memory of loading FLUX.1-dev for fine-tuning, against depth, at the model's real width.

For each depth a fresh process loads a checkpoint of random weights in bf16, reorders units and stores the base in bf16:

whole      the module in fp32 in host memory, then its base in lower precision
blockwise  as `dyexport.build` does, one block after the other, onto torch's meta device in the place of a GPU: the
           memory that a GPU would take is not counted

Measured is the peak of resident memory (VmHWM), less that before; both with glibc returning freed memory at once.

    python -m benchmarks.loading_memory

A depth of n means n double and 2 n single blocks. A line through the depths gives that of FLUX.1-dev, 19. Writes
benchmarks/results/loading_memory.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.training_memory import FULL, RESULTS, flux, status
from dyexport.bench.report import as_markdown
from dyexport.checkpoints.blockwise import BlockLoader
from dyexport.checkpoints.static import load_static, meta_backbone, write_config
from dyexport.checkpoints.weight_files import write_shards
from dyexport.files import write_atomically
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.frozen_base import lower_base

DEPTHS = (1, 2)
METHODS = ("whole", "blockwise")
SIZE = 512  # pixels, of no effect on weights


class RandomWeights(Mapping[str, Tensor]):
    """Random weights in bf16 of the shapes of a module on the meta device, made when they are read."""

    def __init__(self, shapes: Mapping[str, Tensor]) -> None:
        self.shapes = shapes

    def __getitem__(self, name: str) -> Tensor:
        return torch.randn(self.shapes[name].shape, dtype=torch.bfloat16) * 0.02

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def save_checkpoint(depth: int, directory: Path) -> None:
    preset = flux(depth, SIZE)
    backbone = meta_backbone(preset, preset.transformer_config())
    write_config(backbone, directory)
    write_shards(RandomWeights(backbone.state_dict()), directory)


def measured(method: str, depth: int, directory: str) -> int:
    """Return the peak of resident memory while the checkpoint is loaded, less that before."""
    preset = flux(depth, SIZE)
    order = {name: torch.arange(preset.heads).flip(0).repeat(preset.depth, 1) for name in ("heads", "groups")}
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    if method == "blockwise":
        loader = BlockLoader(directory, preset)
        model = DynamicTransformer(loader.backbone, loader.adapter, heads=preset.heads, td_lora=preset.recipe.td_lora)
        for part in model.parts().values():
            part.to("meta")
        loader.load("bf16", "meta", order)
        return status("VmHWM") - before
    backbone = load_static(directory, preset)
    adapter = BlockLoader(directory, preset).adapter
    model = DynamicTransformer(backbone, adapter, heads=preset.heads, td_lora=preset.recipe.td_lora)
    for block in range(preset.depth):
        adapter.permute_units(backbone, block, order["heads"][block], order["groups"][block])
    lower_base(model, "bf16")
    return status("VmHWM") - before


def in_process(method: str, depth: int, directory: str) -> dict[str, Any]:
    """Measure in a fresh process."""
    words = [sys.executable, "-m", "benchmarks.loading_memory", "--one", method, str(depth), directory]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return {"method": method, "depth": depth, "bytes": int(done.stdout)}


def at_full_depth(points: Sequence[Mapping[str, Any]], method: str) -> float:
    """Return the bytes at the depth of FLUX.1-dev, by a line through the points."""
    own = [point for point in points if point["method"] == method]
    slope, start = np.polyfit([point["depth"] for point in own], [point["bytes"] for point in own], 1)
    return float(start + slope * FULL)


def write(points: Sequence[Mapping[str, Any]]) -> None:
    full = {method: at_full_depth(points, method) for method in METHODS}
    document = {"torch": torch.__version__, "points": list(points), "full_bytes": full}
    write_atomically(RESULTS / "loading_memory.json", f"{json.dumps(document, indent=1)}\n".encode())
    cells = [
        [
            method,
            *(f"{point['bytes'] / 1e9:.1f} GB" for point in points if point["method"] == method),
            f"{value / 1e9:.1f} GB",
        ]
        for method, value in full.items()
    ]
    header = ["loaded", *(f"depth {depth}" for depth in DEPTHS), f"line at depth {FULL}"]
    write_atomically(RESULTS / "loading_memory.md", as_markdown(header, cells).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        method, depth, directory = options.one
        print(measured(method, int(depth), directory))
        return
    points = []
    for depth in DEPTHS:
        with TemporaryDirectory() as directory:
            save_checkpoint(depth, Path(directory))
            points += [in_process(method, depth, directory) for method in METHODS]
    write(sorted(points, key=lambda point: METHODS.index(point["method"])))


if __name__ == "__main__":
    main()
