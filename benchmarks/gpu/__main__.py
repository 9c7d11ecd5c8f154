"""The one command; see the package's docstring."""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import benchmarks.gpu
from benchmarks.gpu.cases import Case, CaseName, make_case
from benchmarks.gpu.report import Results, circumstances
from benchmarks.gpu.timing import Timing
from benchmarks.gpu.with_engines import SECTIONS as ENGINE_SECTIONS
from benchmarks.gpu.with_torch import time_case
from dyexport.bundle.spec import Precision

Section = Callable[[Case, Timing, int], dict[str, Any]]

SECTIONS: dict[str, Section] = {"torch": time_case, **ENGINE_SECTIONS}
PRECISIONS: dict[str, Precision] = {"torch": "bf16"}
OTHERWISE: Precision = "fp16"  # ONNX Runtime has few kernels in bf16
RESULTS = Path(__file__).parents[1] / "results"
CASES = {
    "torch": "dit-xl-2:all:2,dit-xl-2-512:all:2,flux/4+8:all:1,dit-xl-2:capacity:2,dit-xl-2:all:16,flux:all:1:2",
    "engines": "dit-xl-2:all:2",
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    results = Results(options.out)
    made = circumstances(options.device, " ".join(["python -m benchmarks.gpu", *(arguments or sys.argv[1:])]))
    timing = Timing(device=options.device, rounds=options.rounds, repeats=options.repeats)
    started = time.monotonic()
    for section in options.sections.split(","):
        for text in (options.cases or CASES["torch" if section == "torch" else "engines"]).split(","):
            left = options.seconds - (time.monotonic() - started)
            record = measure(section, text, options, timing) if left > 0 else {"failure": "not begun: out of time"}
            print(results.add(section, text, {**made, **record}), flush=True)
            _tidy(options.device)
    print(results.table())


def measure(section: str, text: str, options: argparse.Namespace, timing: Timing) -> dict[str, Any]:
    """A record; of a failure, whatever it was, the sentence."""
    begin = time.monotonic()
    try:
        precision = "fp32" if options.device == "cpu" else PRECISIONS.get(section, OTHERWISE)
        case = make_case(CaseName.parse(text), options.budget, precision)
        record = SECTIONS[section](case, timing, options.steps)
    except Exception as error:
        traceback.print_exc()
        record = {"failure": f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"}
    return {**record, "took": time.monotonic() - begin}


def _tidy(device: str) -> None:
    """The next case starts with all of the memory."""
    torch.compiler.reset()
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=benchmarks.gpu.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[1] / "results", help="folder of gpu.json, .md"
    )
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--cases", help="most important first; by default DiT-XL/2 at 256 and 512 px, and FLUX")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=50, help="of a trajectory, which is conditioned once")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=1200.0, help="begin no new case after this long")
    return parser


if __name__ == "__main__":
    main()
