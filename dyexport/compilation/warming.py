"""Compile ONNX graphs ahead of their first run, for runtimes that keep what they compile in the user's cache.

Untested on a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from time import perf_counter

from dyexport.bundle.reader import Bundle
from dyexport.engines.registry import EngineOptions, engine_files, get_backend, make_engines
from dyexport.errors import EngineBuildError, UsageError
from dyexport.stages.ledger import BuildListener

ELSEWHERE = r"(;|, or) use --target onnx$"  # advice of an engine that does not run; nothing compiles for onnx

Announce = Callable[[str, int, int, tuple[str, ...]], None]
"""Called with a target before its engines are compiled: their number, how many are compiled at a time, and the options
of earlier engines that are replaced and that were compiled with others."""


def announce_nothing(target: str, engines: int, at_once: int, replaced: tuple[str, ...]) -> None:
    """Announce to nobody."""


def warm_engines(
    bundle: Bundle, target: str, device: str, listener: BuildListener, announce: Announce = announce_nothing
) -> dict[str, float]:
    """Start every engine of a target once, one at a time; return the seconds by network.

    Raises ``EngineBuildError`` without the GPU, since the runtime compiles for the one that it sees, and
    ``UsageError`` for ``device`` ``cpu``.
    """
    if device == "cpu":
        raise UsageError(f"--device is cpu, and --target {target} compiles for GPUs; give cuda or cuda:N")
    backend = get_backend(target)
    paths = bundle.engine_paths(engine_files(target))
    if (reason := backend.incompatibility(next(iter(paths.values())))) is not None:
        problem = re.sub(ELSEWHERE, "", reason)
        raise EngineBuildError(f"--target {target} compiles on the GPU that runs the engines: {problem}")
    engines = make_engines(target, [*paths.values()], EngineOptions(device=device))
    announce(target, len(paths), 1, ())
    seconds = {}
    for network, engine in zip(paths, engines, strict=True):
        begin, stage = perf_counter(), f"{target} {network}"
        listener.started(stage, "")
        with engine:
            seconds[network] = perf_counter() - begin
        listener.finished(stage, seconds[network], reused=False)
    return seconds
