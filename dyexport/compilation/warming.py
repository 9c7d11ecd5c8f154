"""Compile ONNX graphs ahead of their first run, for runtimes that keep what they compile in the user's cache.

Untested on a GPU.
"""

from __future__ import annotations

from time import perf_counter

from dyexport.bundle.reader import Bundle
from dyexport.engines.registry import EngineOptions, engine_files, get_backend, make_engines
from dyexport.errors import EngineBuildError, UsageError
from dyexport.stages.ledger import BuildListener


def warm_engines(bundle: Bundle, target: str, device: str, listener: BuildListener) -> dict[str, float]:
    """Start every engine of a target once, one at a time; return the seconds by network.

    Raises ``EngineBuildError`` without the GPU, since the runtime compiles for the one that it sees, and
    ``UsageError`` for ``device`` ``cpu``.
    """
    if device == "cpu":
        raise UsageError(f"--device is cpu, and --target {target} compiles for GPUs; give cuda or cuda:N")
    backend = get_backend(target)
    paths = bundle.engine_paths(engine_files(target))
    if (reason := backend.incompatibility(next(iter(paths.values())))) is not None:
        raise EngineBuildError(f"--target {target} compiles on the GPU that runs the engines: {reason}")
    engines = make_engines(target, [*paths.values()], EngineOptions(device=device))
    seconds = {}
    for network, engine in zip(paths, engines, strict=True):
        begin, stage = perf_counter(), f"{target} {network}"
        listener.started(stage, "")
        with engine:
            seconds[network] = perf_counter() - begin
        listener.finished(stage, seconds[network], reused=False)
    return seconds
