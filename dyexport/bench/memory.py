"""Memory that a bundle or its dense graph adds to a process, each measured in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dyexport.bench.rows import Memory
from dyexport.errors import DyexportError

ON_CPU = "runs on the CPU"


@dataclass(frozen=True, kw_only=True)
class MemoryProbe:
    """Settings of one measurement: the dense graph, or the bundle with as many engines as fit into ``memory``.

    ``size`` is (height, width) in pixels; None: that of the bundle.
    """

    bundle: str
    target: str
    batch: int
    threads: int
    share_weights: bool
    memory: int | None = None
    dense: bool
    device: str = "cpu"
    size: tuple[int, int] | None = None


def added_bytes(probe: MemoryProbe) -> int | None:
    """Return the growth of the proportional set size by running each engine once; None if the system cannot tell."""
    return measure_memory(probe).resident_bytes


def measure_memory(probe: MemoryProbe) -> Memory:
    """Measure memory in a fresh process: freed memory, shared pages and other engines of this one would distort it."""
    command = [sys.executable, "-m", "dyexport.bench.memory", json.dumps(asdict(probe))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise DyexportError(f"measuring memory failed with exit code {done.returncode}: {last[0]}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def with_and_without_sharing(probe: MemoryProbe, *, shares: bool, shareable: bool) -> Memory:
    """Measure a variant as it runs, and with one mapped copy of the weights.

    ``shares``: its engines share weights as they run; ``shareable``: they can.
    """
    memory = measure_memory(probe)
    if shares:
        return replace(memory, shared_bytes=memory.resident_bytes)
    if not shareable:
        return memory
    return replace(memory, shared_bytes=added_bytes(replace(probe, share_weights=True)))


def _measure(probe: MemoryProbe) -> Memory:
    """Measure memory in this process."""
    import torch

    import dyexport.runtime.loading as pipeline
    from dyexport.bench.sizes import spec_at
    from dyexport.bench.variants import dense_variant, segment_variants
    from dyexport.bundle.reader import Bundle
    from dyexport.runtime.residency import process_bytes

    torch.set_num_threads(probe.threads)
    bundle = Bundle.open(probe.bundle, check_hashes=False)  # the caller has checked them
    spec = spec_at(bundle.manifest.model, None if probe.size is None else (probe.size[0], probe.size[1]))
    loaded = pipeline.load(
        probe.bundle,
        target=probe.target,
        device=probe.device,
        share_weights=probe.share_weights,
        memory=probe.memory,
        dense=probe.dense,
        check_hashes=False,
    )
    runs: Sequence[Callable[[], object]]
    if probe.dense:
        runs = [dense_variant(loaded, spec, probe.batch)]
    else:
        runs = segment_variants(loaded, bundle, probe.batch, spec)
    before = process_bytes()
    on_device = _run_all(runs, probe.device)
    after = process_bytes()
    return Memory(resident_bytes=None if before is None or after is None else after - before, **on_device)


def _run_all(runs: Sequence[Callable[[], object]], device: str) -> dict[str, Any]:
    """Run everything once; return the peak of the device memory. The allocators keep what they have."""
    if device == "cpu":
        for run in runs:
            run()
        return {"device_reason": ON_CPU}
    import torch

    from dyexport.bench.nvml import Gpu
    from dyexport.bench.unavailable import Unavailable

    peak = 0
    for run in runs:
        run()
        torch.cuda.synchronize(device)
    of_torch = torch.cuda.max_memory_allocated(device)
    try:
        gpu = Gpu.open(device)
        peak = gpu.process_bytes()
        gpu.close()
    except Unavailable as error:
        return {"torch_device_bytes": of_torch, "device_reason": str(error)}
    return {"torch_device_bytes": of_torch, "device_bytes": peak}


if __name__ == "__main__":
    print(json.dumps(asdict(_measure(MemoryProbe(**json.loads(sys.argv[1]))))))
