"""The one command; see the package's docstring."""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch

import benchmarks.gpu
from benchmarks.gpu.report import Results, circumstances
from benchmarks.gpu.sections import SECTIONS
from benchmarks.gpu.settings import Settings
from dyexport.errors import UsageError, reason

RESULTS = Path(__file__).parents[1] / "results"
REHEARSAL = {"steps": 4, "rounds": 1, "repeats": 1}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    names = options.sections.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        raise SystemExit(f"unknown section {unknown[0]!r}; known: {', '.join(SECTIONS)}")
    results = Results(options.out)
    if options.tables:
        results.rewrite()
        print(results.tables())
        return
    made = circumstances(options.device, " ".join(["python -m benchmarks.gpu", *(arguments or sys.argv[1:])]))
    settings = Settings(
        device=options.device,
        work=options.work,
        patience=options.patience,
        **(REHEARSAL if options.rehearse else {name: getattr(options, name) for name in REHEARSAL}),
    )
    for name in names:
        section = SECTIONS[name]
        default_cases = section.rehearsal if options.rehearse else section.cases
        watch = Watch(options.limit)
        for case in options.cases.split(",") if options.cases else default_cases:
            record = {"failure": refusal} if (refusal := watch.refusal()) else measure(name, case, settings)
            watch.took(record.get("took", 0.0))
            print(results.add(name, case, {**made, **record}), flush=True)
            _tidy(settings.device)
    print(results.tables())


class Watch:
    """Time of one section: a case is begun only if the longest one so far would still fit."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._end = time.monotonic() + limit
        self._longest = 0.0

    def took(self, seconds: float) -> None:
        self._longest = max(self._longest, seconds)

    def refusal(self) -> str | None:
        """Explain why no further case is begun; None if one may be."""
        left = self._end - time.monotonic()
        if left > self._longest:
            return None
        return f"not begun: {max(left, 0):.0f} of {self._limit:.0f} s are left, and a case took {self._longest:.0f}"


def measure(section: str, case: str, settings: Settings) -> dict[str, Any]:
    """Return a record, or the sentence of a failure, whatever it was."""
    begin = time.monotonic()
    try:
        record = SECTIONS[section].measure(case, settings)
    except Exception as error:
        if not isinstance(error, UsageError):
            traceback.print_exc()
        record = {"failure": f"{type(error).__name__}: {reason(error)}"}
    return {**record, "took": time.monotonic() - begin}


def _tidy(device: str) -> None:
    """Leave all of the memory to the next case."""
    torch.compiler.reset()
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=benchmarks.gpu.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gpu.jsonl, gpu.json and gpu.md")
    parser.add_argument("--tables", action="store_true", help="measure nothing: write gpu.json, gpu.md from gpu.jsonl")
    parser.add_argument("--work", type=Path, default=Path(gettempdir()) / "dyexport-gpu", help="folder of bundles")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="separated by commas, in their order")
    parser.add_argument("--cases", help="instead of a section's own, most important first, separated by commas")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds of a section, after which none is begun")
    parser.add_argument("--patience", type=float, default=200.0, help="seconds for one command of a bundle")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rehearse", action="store_true", help="run small cases of the same code, once each")
    parser.add_argument("--steps", type=int, default=50, help="of a trajectory, which is conditioned once")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=10)
    return parser


if __name__ == "__main__":
    main()
