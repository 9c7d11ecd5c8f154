"""``dyexport.compile_engines``: engines of a bundle, made on the machine that will run them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

from dyexport.bundle.manifest import Manifest
from dyexport.bundle.manifest_file import MANIFEST, read_manifest
from dyexport.bundle.reader import Bundle
from dyexport.bundle.targets import ONNX, TARGETS
from dyexport.bundle.token_paths import token_path_refusal
from dyexport.compilation.base import Compiler, EngineJob
from dyexport.compilation.install import check_can_grow, finish_install, install, work_folder, working_folder
from dyexport.compilation.jobs import ENGINES, builders_at_once, bundle_jobs, compile_jobs
from dyexport.compilation.registry import CompileOptions, get_compiler
from dyexport.compilation.settings import CompileSettings
from dyexport.compilation.warming import Announce, announce_nothing, warm_engines
from dyexport.digests import remember
from dyexport.engines.networks import check_networks
from dyexport.errors import EngineBuildError, missing_extras
from dyexport.exporters.tensorrt_profiles import TensorrtSettings
from dyexport.files import remove, storage_errors, user_cache
from dyexport.progress import Progress
from dyexport.stages.ledger import BuildListener, Ledger, NullListener, Reporter
from dyexport.stages.locking import locked_output


@dataclass(frozen=True, kw_only=True)
class CompiledTarget:
    """Result for one target: the networks that were compiled, with seconds, and those that were ``up_to_date``.

    ``elapsed`` is the wall time of this run in seconds; engines are compiled at the same time. ``bytes`` are those of
    the target's engines in the bundle.
    """

    target: str
    seconds: dict[str, float]
    elapsed: float
    up_to_date: tuple[str, ...]
    bytes: int


@missing_extras()
def compile_engines(
    bundle: Bundle | str | Path,
    target: str | Sequence[str],
    *,
    profiles: Sequence[str] = (),
    compute_capabilities: Sequence[str] = (),
    stream_weights: bool = False,
    device: str | None = None,
    jobs: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Bundle:
    """Compile the graphs of a bundle for a target, or several, and add the engines to the bundle.

    Needs neither the checkpoint nor the work directory of the build. Engines of that target for another GPU, builder
    version or graph are replaced; those that are up to date stay. A stopped compilation resumes after its last engine.

    ``profiles`` are sizes such as ``"batch=1:2:8"``, ``compute_capabilities`` GPUs such as ``"8.9"`` (default: all that
    TensorRT-RTX supports). With ``stream_weights``, weights that do not fit on the GPU may stay in host memory.
    ``device`` is that of target ``torch``. ``jobs`` engines are compiled at a time. ``progress(stage, done, total)`` is
    called as work proceeds.

    Example: ``dyexport.compile_engines("my-bundle", "tensorrt-rtx", compute_capabilities=["8.9"])``

    Raises ``UsageError`` for an option that no target has, ``StorageError`` for a bundle that is read-only or being
    written, ``MissingDependencyError`` without a builder, and ``EngineBuildError`` if it refuses a graph.
    """
    root = bundle.root if isinstance(bundle, Bundle) else Path(bundle)
    settings = CompileSettings(
        targets=(target,) if isinstance(target, str) else tuple(target),
        tensorrt=TensorrtSettings(
            compute_capabilities=tuple(compute_capabilities), profiles=tuple(profiles), stream_weights=stream_weights
        ),
        device=device,
        jobs=jobs,
    )
    compile_bundle(root, settings, NullListener() if progress is None else Reporter(progress))
    return Bundle.open(root)


def compile_bundle(
    path: Path, settings: CompileSettings, listener: BuildListener, announce: Announce = announce_nothing
) -> list[CompiledTarget]:
    """Compile the graphs of a bundle for each target of ``settings``. Raises as ``compile_engines`` does."""
    root = Path(os.path.realpath(path))
    manifest = read_manifest(root / MANIFEST)  # refuses anything else before a builder is loaded
    settings.check_for(manifest)
    targets = tuple(dict.fromkeys(settings.targets))
    compilers = {target: _compiler(target, settings) for target in targets if TARGETS[target].compiled}
    if len(compilers) == len(targets) and not work_folder(root).exists():
        bundle = _checked(root)
        if not any(stale_jobs(bundle, compiler) for compiler in compilers.values()):
            return [_up_to_date(bundle, target, listener) for target in targets]
    if not compilers:  # nothing is added to the bundle
        bundle = _checked(root)
        return [_warm(bundle, target, settings, listener, announce) for target in targets]
    check_can_grow(root)
    with locked_output(root):
        finish_install(root)
        _checked(root)
        with working_folder(root) as work:
            return [
                _compile_target(Bundle.open(root), compilers[target], work, settings, listener, announce)
                if target in compilers
                else _warm(Bundle.open(root), target, settings, listener, announce)
                for target in targets
            ]


def _checked(root: Path) -> Bundle:
    bundle = Bundle.open(root)
    check_networks(bundle, ONNX)
    return bundle


def _compiler(target: str, settings: CompileSettings) -> Compiler:
    options = CompileOptions(tensorrt=settings.tensorrt, device=settings.device)
    return get_compiler(target, options, user_cache() / "timings")


def _compile_target(
    bundle: Bundle,
    compiler: Compiler,
    work: Path,
    settings: CompileSettings,
    listener: BuildListener,
    announce: Announce,
) -> CompiledTarget:
    target = compiler.target
    _check_token_path(bundle, target)
    stale = stale_jobs(bundle, compiler)
    if not stale:
        return _up_to_date(bundle, target, listener)
    at_once = builders_at_once(compiler, stale, at_once=settings.jobs)
    announce(target, len(stale), at_once, other_options(bundle, compiler, stale))
    begin = perf_counter()
    outcomes = compile_jobs(Ledger(work, listener), compiler, stale, partial(_progress, listener), at_once=at_once)
    current = frozenset(engines_of(bundle, target)) - {job.network for job in stale}
    manifest = install(bundle, target, outcomes, current)
    with storage_errors(work):
        remove(work / ENGINES / target)
    for name in manifest.files.keys() - bundle.manifest.files.keys():
        remember(bundle.root / name, manifest.files[name].sha256)
    return CompiledTarget(
        target=target,
        seconds={name: outcome.made_in or outcome.seconds for name, outcome in outcomes.items()},
        elapsed=perf_counter() - begin,
        up_to_date=tuple(sorted(current)),
        bytes=_bytes(manifest, target),
    )


def stale_jobs(bundle: Bundle, compiler: Compiler) -> list[EngineJob]:
    """Return the jobs whose engines a bundle lacks, or has for another GPU, builder, graph or request."""
    engines = engines_of(bundle, compiler.target)
    return [
        job
        for job in bundle_jobs(bundle)
        if job.network not in engines or not compiler.is_current(job, engines[job.network])
    ]


def other_options(bundle: Bundle, compiler: Compiler, stale: Sequence[EngineJob]) -> tuple[str, ...]:
    """Return the options by which stale engines were compiled and that their new requests replace, as written."""
    engines = engines_of(bundle, compiler.target)
    replaced = (compiler.other_options(job, engines[job.network]) for job in stale if job.network in engines)
    return tuple(dict.fromkeys(option for options in replaced for option in options))


def engines_of(bundle: Bundle, target: str) -> dict[str, Path]:
    """Return the engine files of a target, by network; none if the bundle has none."""
    return {e.network: bundle.root / e.path for e in bundle.manifest.engines if e.target == target}


def _up_to_date(bundle: Bundle, target: str, listener: BuildListener) -> CompiledTarget:
    engines = engines_of(bundle, target)
    for network in engines:
        listener.finished(f"{target} {network}", 0.0, reused=True)
    size = _bytes(bundle.manifest, target)
    return CompiledTarget(target=target, seconds={}, elapsed=0.0, up_to_date=tuple(engines), bytes=size)


def _bytes(manifest: Manifest, target: str) -> int:
    return sum(manifest.files[engine.path].bytes for engine in manifest.engines if engine.target == target)


def _progress(listener: BuildListener, stage: str) -> Progress:
    return partial(listener.advanced, stage)


def _check_token_path(bundle: Bundle, target: str) -> None:
    if (refusal := token_path_refusal(bundle.manifest.plan, target)) is not None:
        raise EngineBuildError(f"{bundle.root} {refusal}")


def _warm(
    bundle: Bundle, target: str, settings: CompileSettings, listener: BuildListener, announce: Announce
) -> CompiledTarget:
    _check_token_path(bundle, target)
    begin = perf_counter()
    seconds = warm_engines(bundle, target, settings.device or "cuda", listener, announce)
    return CompiledTarget(target=target, seconds=seconds, elapsed=perf_counter() - begin, up_to_date=(), bytes=0)
