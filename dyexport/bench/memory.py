"""Memory that a bundle or its dense graph adds to a process, each measured in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass

from dyexport.errors import DyexportError


@dataclass(frozen=True, kw_only=True)
class MemoryProbe:
    """Settings of one measurement: the dense graph, or the bundle with as many engines as fit into ``memory``."""

    bundle: str
    target: str
    batch: int
    threads: int
    share_weights: bool
    memory: int | None = None
    dense: bool


def added_bytes(probe: MemoryProbe) -> int | None:
    """Return the growth of the proportional set size by running each engine once; None if the system cannot tell.

    Measured in a fresh process: freed memory, shared pages and other engines of this one would distort it.
    """
    command = [sys.executable, "-m", "dyexport.bench.memory", json.dumps(asdict(probe))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise DyexportError(f"measuring memory failed with exit code {done.returncode}: {last[0]}")
    growth: int | None = json.loads(done.stdout.splitlines()[-1])
    return growth


def _measure(probe: MemoryProbe) -> int | None:
    """Measure ``added_bytes`` in this process."""
    import torch

    import dyexport.runtime.loading as pipeline
    from dyexport.bench.variants import module_variant, segment_variants
    from dyexport.bundle.reader import Bundle
    from dyexport.runtime.residency import process_bytes
    from dyexport.runtime.stock import example_inputs

    torch.set_num_threads(probe.threads)
    bundle = Bundle.open(probe.bundle, check_hashes=False)  # the caller has checked them
    spec = bundle.manifest.model
    loaded = pipeline.load(
        probe.bundle,
        target=probe.target,
        device="cpu",
        share_weights=probe.share_weights,
        memory=probe.memory,
        dense=probe.dense,
        check_hashes=False,
    )
    if probe.dense:
        runs = [module_variant(loaded, example_inputs(spec, probe.batch, spec.timestep_range[0]), "cpu")]
    else:
        runs = segment_variants(loaded, bundle, probe.batch)
    before = process_bytes()
    for run in runs:
        run()
    after = process_bytes()
    return None if before is None or after is None else after - before


if __name__ == "__main__":
    print(json.dumps(_measure(MemoryProbe(**json.loads(sys.argv[1])))))
