"""Bytes read where nothing is to be done: by a build that finds everything up to date, and by a second ``load``.

Each is done twice in a fresh process and measured the second time, when Python's modules are loaded: what it asks
the kernel for (``rchar`` of /proc/self/io), and what comes from the disk (``read_bytes``) when the model's files were
dropped from memory before, which counts files that are mapped too.

    python -m benchmarks.bytes_read --work out/bytes-read
    PYTHONPATH=/path/to/other/version python benchmarks/bytes_read.py --work out/bytes-read-other

Takes minutes, all of it the first build.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from dyexport.pipeline.build import build_bundle, opened
from dyexport.pipeline.settings import BuildSettings
from dyexport.runtime.loading import load
from dyexport.stages.ledger import NullListener


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/bytes-read"))
    parser.add_argument("--model", default="dit-s-2")
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--only", choices=("build", "load"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    settings = BuildSettings(
        model=options.model,
        budget=0.5,
        random_weights=True,
        engines=options.engines,
        out=options.work / "bundle",
        work=options.work / "bundle.work",
    )

    def build() -> None:
        with opened(settings, NullListener()) as run:
            build_bundle(run)

    actions: dict[str, Callable[[], object]] = {"build": build, "load": lambda: load(settings.out)}
    if options.only:
        measure(options.only, actions[options.only], options.work)
        return
    build()
    size = sum(path.stat().st_size for path in settings.out.rglob("*") if path.is_file())
    print(f"{options.model}, K = {options.engines}, a bundle of {size / 1e6:.0f} MB")
    for name in actions:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", name], check=True, env=os.environ)


def measure(name: str, action: Callable[[], object], folder: Path) -> None:
    action()
    drop(folder)
    before = counters()
    action()
    asked, disk = (after - first for after, first in zip(counters(), before, strict=True))
    print(f"second {name}: {asked / 1e6:.2f} MB asked for, {disk / 1e6:.2f} MB from the disk")


def counters() -> tuple[int, int]:
    """Bytes that this process has read through the kernel, and those of them that came from the disk."""
    facts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(facts["rchar"]), int(facts["read_bytes"])


def drop(folder: Path) -> None:
    """Have the kernel forget the contents of every file, which must be on the disk for it."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


if __name__ == "__main__":
    main()
