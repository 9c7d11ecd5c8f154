"""Four engines at different widths next to the dense one: what each adds to a process, with copies and from one store.

Ordered routers, so that every engine's weights are the first part of the widest one's. Each figure is the
growth of the proportional set size of a fresh process that loads a bundle's engines and runs each once.

    python benchmarks/shared_memory.py --work out/shared-memory

Takes a few minutes on 2 cores, most of it the build. Writes benchmarks/results/shared_memory.json and .md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from dyexport.bench.memory import MemoryProbe, added_bytes
from dyexport.bench.report import Rows, as_markdown
from dyexport.bundle.plan import Segment
from dyexport.bundle.reader import Bundle
from dyexport.console import StageLines, chatter_on_stderr, format_bytes
from dyexport.files import write_atomically
from dyexport.pipeline.build import build_bundle, opened
from dyexport.pipeline.settings import BuildSettings

RESULTS = Path(__file__).parent / "results"
WAYS = ("copied", "mapped")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/shared-memory"))
    parser.add_argument("--model", default="dit-s-2")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    settings = BuildSettings(
        model=options.model,
        budget=options.budget,
        router="ordered",
        random_weights=True,
        engines=options.engines,
        out=options.work / "bundle",
        work=options.work / "bundle.work",
    )
    with chatter_on_stderr(), StageLines() as lines, opened(settings, lines) as run:
        build_bundle(run)
    write_results(options.results, measure(Bundle.open(settings.out), options.batch, options.threads))


def measure(bundle: Bundle, batch: int, threads: int) -> dict[str, Any]:
    """Bytes added by the dense engine and by the segments' engines, each with copies and mapped."""
    added = {}
    for dense, shared in product((True, False), (False, True)):
        probe = MemoryProbe(
            bundle=str(bundle.root), target="onnx", batch=batch, threads=threads, share_weights=shared, dense=dense
        )
        added[f"{'dense' if dense else 'engines'}_{'mapped' if shared else 'copied'}"] = added_bytes(probe)
    plan, widths = bundle.manifest.plan, bundle.widths
    return {
        "model": bundle.manifest.model.name,
        "flops_ratio": plan.flops_ratio,
        "batch": batch,
        "threads": threads,
        "engines": [
            {"start": segment.start, "end": segment.end, **_shares(segment, widths.heads.shape[-1])}
            for segment in plan.segments
        ],
        "weights_copied": plan.resident_bytes,
        "weights_mapped": plan.disk_bytes,
        "added": added,
    }


def _shares(segment: Segment, units: int) -> dict[str, float]:
    """Mean share of a block's heads and groups, of which a dense block has as many: ``units``."""
    kept = {"heads": segment.heads, "groups": segment.groups}
    return {name: sum(map(len, blocks)) / (units * segment.depth) for name, blocks in kept.items()}


def write_results(folder: Path, found: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "shared_memory.json", (json.dumps(found, indent=1) + "\n").encode())
    write_atomically(folder / "shared_memory.md", markdown(found).encode())
    print(markdown(found))


def markdown(found: Mapping[str, Any]) -> str:
    added, count = found["added"], len(found["engines"])
    engines: Rows = [
        (f"t in [{e['start']:.3g}, {e['end']:.3g})", f"{e['heads']:.2f}", f"{e['groups']:.2f}")
        for e in found["engines"]
    ]
    rows: Rows = [
        ("the dense engine", *_sizes(added, "dense")),
        (f"{count} engines", *_sizes(added, "engines")),
        ("of the dense engine", *(f"{added[f'engines_{way}'] / added[f'dense_{way}']:.2f} x" for way in WAYS)),
        (f"weights of the {count}, planned", *(format_bytes(found[f"weights_{way}"]) for way in WAYS)),
    ]
    return (
        f"{found['model']}, random weights, ordered routers, lambda {found['flops_ratio']:.2f}, "
        f"batch {found['batch']}, {found['threads']} threads, ONNX Runtime; each engine with its conditioning.\n\n"
        + as_markdown(("added to a process (PSS)", "a copy for each engine", "mapped from one store"), rows)
        + "\n"
        + as_markdown(("engine", "heads", "MLP groups"), engines)
    )


def _sizes(added: Mapping[str, int], name: str) -> tuple[str, ...]:
    return tuple(format_bytes(added[f"{name}_{way}"]) for way in WAYS)


if __name__ == "__main__":
    main()
