"""What a bundle and its dense graph add to a process, each measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass

from dyexport.errors import DyexportError


@dataclass(frozen=True, kw_only=True)
class MemoryProbe:
    """``dense``: the dense graph; otherwise the bundle with its engines resident, as many as ``memory`` holds."""

    bundle: str
    target: str
    batch: int
    threads: int
    share_weights: bool
    memory: int | None = None
    dense: bool


def added_bytes(probe: MemoryProbe) -> int | None:
    """Growth of the proportional set size by running each engine once; None where the system does not tell.

    A fresh process, because in this one freed memory, shared pages and other engines would blur it.
    """
    command = [sys.executable, "-m", "dyexport.bench.memory", json.dumps(asdict(probe))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise DyexportError(f"measuring memory failed with exit code {done.returncode}: {last[0]}")
    found: int | None = json.loads(done.stdout.splitlines()[-1])
    return found


def _measure(probe: MemoryProbe) -> int | None:
    """``added_bytes`` of this process."""
    import torch

    import dyexport.runtime.loading as pipeline
    from dyexport.bench.variants import module_variant, segment_variants
    from dyexport.bundle.reader import Bundle
    from dyexport.runtime.residency import process_bytes
    from dyexport.runtime.transformer import example_inputs

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
