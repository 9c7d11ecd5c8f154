"""Memory of a step of fine-tuning FLUX.1-dev against depth, at the model's real width.

For each storage of the base, picture size and depth a fresh process takes the first two steps of TD-LoRA fine-tuning
with a micro-batch of one, recomputed blocks and random weights: dynamic and dense model, backward pass, AdamW and
averages.

traced    all tensors that are alive, under torch's fake tensors: sizes are real, arithmetic is left out. Exact but for
          kernels' workspaces and fragments. Every depth is possible.
resident  the same step with arithmetic, on a CPU: peak of resident memory (VmHWM), less that before the model was
          made. At 256 px, where a step takes minutes.

    python -m benchmarks.training_memory

A depth of n means n double and 2 n single blocks. A line through the depths gives that of FLUX.1-dev, 19, next to the
estimate that a build prints. Writes benchmarks/results/training_memory.json and .md, after each process.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from benchmarks.gpu.with_training import NoiseSource
from dyexport.backbones import get_adapter
from dyexport.backbones.flux.preset import FluxPreset
from dyexport.backbones.recipe import BasePrecision
from dyexport.bench.report import as_markdown
from dyexport.files import write_atomically
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.frozen_base import FrozenLinear, frozen_linears, lower_base
from dyexport.presets import PRESETS
from dyexport.training.config import FinetuneConfig
from dyexport.training.finetuning import DynamicTrainer
from dyexport.training.memory import Division, FinetuningRun, memory_of

RESULTS = Path(__file__).parent / "results"
FULL = 19
STEPS = 2
CASES = {
    "traced": [(base, size) for size in (512, 1024) for base in ("bf16", "int8", "nf4")],
    "resident": [(base, 256) for base in ("bf16", "nf4")],
}
DEPTHS = {"traced": (1, 2, 3), "resident": (1, 2)}


def flux(depth: int, size: int) -> FluxPreset:
    """FLUX.1-dev with ``depth`` double and twice as many single blocks, for pictures of ``size`` pixels."""
    full = PRESETS["flux"]
    assert isinstance(full, FluxPreset)
    name = f"flux-depth-{depth}"
    return replace(full, name=name, double_blocks=depth, single_blocks=2 * depth, side=size // 16)


class Allocations(TorchDispatchMode):
    """Bytes of the storages that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            self.now += self.alive[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.now -= self.alive.pop(key)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.note, result)
        return result


def meta_model(preset: FluxPreset) -> DynamicTransformer:
    adapter, recipe = get_adapter(preset.backbone), preset.recipe
    with torch.device("meta"):
        backbone = adapter.build(preset.transformer_config())
        return DynamicTransformer(backbone, adapter, heads=preset.heads, td_lora=recipe.td_lora).eval()


def fill(model: DynamicTransformer, base: BasePrecision) -> None:
    """Make random weights layer by layer, so that there is no copy of the base in fp32."""
    for linear in list(frozen_linears(model)):
        linear.weight = nn.Parameter(torch.randn(linear.weight.shape) / linear.in_features**0.5, requires_grad=False)
        FrozenLinear.of(linear, base, torch.device("cpu"))
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            if value.is_meta:
                filled = nn.Parameter(torch.randn(value.shape) * 0.02, requires_grad=value.requires_grad)
                setattr(module, name, filled)
    for router in model.block_routers:
        router.open()


def new_trainer(model: DynamicTransformer, preset: FluxPreset, base: BasePrecision, folder: str) -> DynamicTrainer:
    config = FinetuneConfig(steps=10, batch_size=1, ema_decay=0.999, base_precision=base, checkpointing=True)
    return DynamicTrainer(model, preset, NoiseSource(preset), config, work_dir=Path(folder))


def traced(preset: FluxPreset, base: BasePrecision) -> int:
    """Return the peak of allocations of the first steps; their arithmetic is left out."""
    model = meta_model(preset)
    with FakeTensorMode(allow_non_fake_inputs=True), staying(), TemporaryDirectory() as folder:
        model.to_empty(device="cpu")
        lower_base(model, base)
        trainer = new_trainer(model, preset, base, folder)
        allocations = Allocations()
        for tensor in (*trainer.model.parameters(), *trainer.ema.averages.values()):
            allocations.note(tensor)
        with allocations:
            for _ in range(STEPS):
                trainer.advance()
        return allocations.peak


@contextmanager
def staying() -> Iterator[None]:
    """Leave modules where they are: fake tensors cannot be moved in place, and are there already."""
    with patch.object(nn.Module, "to", lambda module, *_, **__: module):
        yield


def resident(preset: FluxPreset, base: BasePrecision) -> int:
    """Return the peak of resident memory of the first steps, less that before the model was made."""
    before, model = status("VmRSS"), meta_model(preset)
    fill(model, base)
    with TemporaryDirectory() as folder:
        trainer = new_trainer(model, preset, base, folder)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        for _ in range(STEPS):
            trainer.advance()
        return status("VmHWM") - before


def status(name: str) -> int:
    """Return an entry of this process's status, in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def estimated(preset: FluxPreset, base: BasePrecision) -> float:
    """Return the estimate that a build prints."""
    recipe = preset.recipe
    run = FinetuningRun(preset=preset, schedule=recipe.finetune_lora, td_lora=recipe.td_lora, base_precision=base)
    return memory_of(run, Division(micro_batch=1, checkpointing=True)).total


def in_process(method: str, base: str, size: int, depth: int) -> dict[str, Any]:
    """Measure in a fresh process, with glibc returning freed memory at once."""
    words = [sys.executable, "-m", "benchmarks.training_memory", "--one", method, base, str(size), str(depth)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return {"method": method, "base": base, "size": size, "depth": depth, **json.loads(done.stdout)}


def one(method: str, base: BasePrecision, size: int, depth: int) -> dict[str, float]:
    preset = flux(depth, size)
    measure = traced if method == "traced" else resident
    return {"bytes": measure(preset, base), "estimated_bytes": estimated(preset, base)}


def extrapolated(points: Sequence[Mapping[str, Any]]) -> float:
    """Return the bytes at full depth, by a line through the points."""
    slope, start = np.polyfit([point["depth"] for point in points], [point["bytes"] for point in points], 1)
    return float(start + slope * FULL)


def summary(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each case, at full depth."""
    rows = []
    for case in dict.fromkeys((point["method"], point["base"], point["size"]) for point in points):
        method, base, size = case
        own = [point for point in points if (point["method"], point["base"], point["size"]) == case]
        shallow = [point for point in own if point["depth"] != FULL]
        whole = [point["bytes"] for point in own if point["depth"] == FULL]
        if len(shallow) > 1:
            row = {"method": method, "base": base, "size": size, "depths": [point["depth"] for point in shallow]}
            row |= {"full_bytes": extrapolated(shallow), "estimated_bytes": estimated(flux(FULL, size), base)}
            rows.append({**row, "traced_at_full_depth": whole[0] if whole else None})
    return rows


def write(points: Sequence[Mapping[str, Any]]) -> None:
    rows = summary(points)
    document = {"torch": torch.__version__, "micro_batch": 1, "points": list(points), "full": rows}
    write_atomically(RESULTS / "training_memory.json", f"{json.dumps(document, indent=1)}\n".encode())
    cells = [
        [
            row["base"],
            f"{row['size']} px",
            row["method"],
            ", ".join(map(str, row["depths"])),
            f"{row['full_bytes'] / 1e9:.1f} GB",
            "-" if row["traced_at_full_depth"] is None else f"{row['traced_at_full_depth'] / 1e9:.1f} GB",
            f"{row['estimated_bytes'] / 1e9:.1f} GB",
        ]
        for row in rows
    ]
    header = ["base", "picture", "method", "depths", "line at depth 19", "at depth 19", "estimate"]
    write_atomically(RESULTS / "training_memory.md", as_markdown(header, cells).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--methods", nargs="+", default=["traced", "resident"], choices=["traced", "resident"])
    parser.add_argument("--full", action="store_true", help="also trace all 19 + 38 blocks at 1024 px")
    parser.add_argument("--bases", nargs="+", default=["bf16", "int8", "nf4"], choices=["bf16", "int8", "nf4"])
    parser.add_argument("--sizes", nargs="+", default=[256, 512, 1024], type=int)
    parser.add_argument("--depths", nargs="+", default=[1, 2, 3], type=int)
    options = parser.parse_args()
    if options.one:
        method, base, size, depth = options.one
        print(json.dumps(one(method, base, int(size), int(depth))))
        return
    cases = [
        (method, base, size, depth)
        for method in options.methods
        for base, size in CASES[method]
        for depth in DEPTHS[method]
        if base in options.bases and size in options.sizes and depth in options.depths
    ]
    cases += [("traced", base, 1024, FULL) for base in ("bf16", "nf4")] if options.full else []
    file, names = RESULTS / "training_memory.json", ("method", "base", "size", "depth")
    for case in cases:
        print(*case, file=sys.stderr, flush=True)
        measured = in_process(*case)
        points = json.loads(file.read_text())["points"] if file.exists() else []
        points = [point for point in points if tuple(point[name] for name in names) != case]
        write([*points, measured])


if __name__ == "__main__":
    main()
