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
from dyexport.bundle.plan import SegmentPlan
from dyexport.bundle.reader import Bundle, base_of
from dyexport.bundle.targets import ONNX, TARGETS
from dyexport.bundle.token_paths import token_path_refusal
from dyexport.compilation.base import Compiler, EngineJob
from dyexport.compilation.install import check_can_grow, finish_install, install, work_folder, working_folder
from dyexport.compilation.jobs import ENGINES, builders_at_once, bundle_jobs, compile_jobs, network_name
from dyexport.compilation.registry import CompileOptions, get_compiler
from dyexport.compilation.settings import CompileSettings
from dyexport.compilation.warming import Announce, announce_nothing, warm_engines
from dyexport.digests import remember
from dyexport.engines.networks import check_networks
from dyexport.errors import EngineBuildError, MissingDependencyError, missing_extras
from dyexport.exporters.tensorrt_profiles import TensorrtSettings
from dyexport.files import remove, storage_errors, user_cache
from dyexport.progress import Progress
from dyexport.stages.ledger import BuildListener, Ledger, NullListener, Reporter
from dyexport.stages.locking import locked_output


@dataclass(frozen=True, kw_only=True)
class CompiledTarget:
    """Result for one target: the networks that were compiled, with seconds, and those that were ``up_to_date``.

    Networks of one of several budgets have its label: ``segment-00@0.3``. ``elapsed`` is the wall time of
    this run in seconds; engines are compiled at the same time. ``bytes`` are those of the target's engines in the
    bundle.
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
    root = bundle.base if isinstance(bundle, Bundle) else Path(bundle)
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
    root = base_of(root, manifest)
    settings.check_for(Bundle.open(root, check_hashes=False).manifests())
    targets = tuple(dict.fromkeys(settings.targets))
    compilers = {target: _compiler(target, settings, root, manifest) for target in targets if TARGETS[target].compiled}
    if len(compilers) == len(targets) and not work_folder(root).exists():
        bundles = _checked(root)
        if not any(stale_jobs(bundle, compiler) for compiler in compilers.values() for bundle in bundles):
            return [_up_to_date(bundles, target, listener) for target in targets]
    if not compilers:  # nothing is added to the bundle
        bundles = _checked(root)
        return [_warm(bundles, target, settings, listener, announce) for target in targets]
    check_can_grow(root)
    with locked_output(root):
        finish_install(root)
        _checked(root)
        with working_folder(root) as work:
            return [
                _compile_target(
                    Bundle.open(root).at_each_budget(), compilers[target], work, settings, listener, announce
                )
                if target in compilers
                else _warm(Bundle.open(root).at_each_budget(), target, settings, listener, announce)
                for target in targets
            ]


def _checked(root: Path) -> list[Bundle]:
    bundles = Bundle.open(root).at_each_budget()
    for bundle in bundles:
        check_networks(bundle, ONNX)
    return bundles


def _compiler(target: str, settings: CompileSettings, root: Path, manifest: Manifest) -> Compiler:
    options = CompileOptions(tensorrt=settings.tensorrt, device=settings.device)
    try:
        return get_compiler(target, options, user_cache() / "timings")
    except (MissingDependencyError, EngineBuildError):
        _check_token_path(root, manifest.plan, target)  # which no builder and no GPU would change
        raise


def _compile_target(
    bundles: Sequence[Bundle],
    compiler: Compiler,
    work: Path,
    settings: CompileSettings,
    listener: BuildListener,
    announce: Announce,
) -> CompiledTarget:
    """Compile the networks of a bundle at each budget, the default one first, for one target."""
    target = compiler.target
    for bundle in bundles:
        _check_token_path(bundle.root, bundle.manifest.plan, target)
    before = _networks(bundles, target)
    stale = [stale_jobs(bundle, compiler) for bundle in bundles]
    jobs = [job for each in stale for job in each]
    if not jobs:
        return _up_to_date(bundles, target, listener)
    options = (
        option for bundle, each in zip(bundles, stale, strict=True) for option in other_options(bundle, compiler, each)
    )
    announce(target, len(jobs), builders_at_once(compiler, jobs, at_once=settings.jobs), tuple(dict.fromkeys(options)))
    begin, ledger = perf_counter(), Ledger(work, listener)
    progress = partial(_progress, listener)
    outcomes = [
        compile_jobs(ledger, compiler, each, progress, at_once=settings.jobs, label=bundle.label)
        for bundle, each in zip(bundles, stale, strict=True)
    ]
    manifest = install(target, list(zip(bundles, outcomes, strict=True)))
    with storage_errors(work):
        remove(work / ENGINES / target)
    for name in manifest.files.keys() - bundles[0].manifest.files.keys():
        remember(bundles[0].root / name, manifest.files[name].sha256)
    seconds = {
        network_name(name, bundle.label): outcome.made_in or outcome.seconds
        for bundle, each in zip(bundles, outcomes, strict=True)
        for name, outcome in each.items()
    }
    return CompiledTarget(
        target=target,
        seconds=seconds,
        elapsed=perf_counter() - begin,
        up_to_date=tuple(sorted(name for name in before if name not in seconds)),
        bytes=_bytes(Bundle.open(bundles[0].root, check_hashes=False).at_each_budget(), target),
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
    """Return the engine files of a target, by network, that are of the bundle's budget; none if it has none."""
    return {e.network: bundle.base / e.path for e in bundle.manifest.own_engines if e.target == target}


def _networks(bundles: Sequence[Bundle], target: str) -> list[str]:
    """Return the networks that have engines, at each budget."""
    return [network_name(name, bundle.label) for bundle in bundles for name in engines_of(bundle, target)]


def _up_to_date(bundles: Sequence[Bundle], target: str, listener: BuildListener) -> CompiledTarget:
    networks = _networks(bundles, target)
    for network in networks:
        listener.finished(f"{target} {network}", 0.0, reused=True)
    size = _bytes(bundles, target)
    return CompiledTarget(target=target, seconds={}, elapsed=0.0, up_to_date=tuple(networks), bytes=size)


def _bytes(bundles: Sequence[Bundle], target: str) -> int:
    files = bundles[0].manifest.files
    engines = (engine for bundle in bundles for engine in bundle.manifest.engines if engine.target == target)
    return sum(files[path].bytes for path in {engine.path for engine in engines})


def _progress(listener: BuildListener, stage: str) -> Progress:
    return partial(listener.advanced, stage)


def _check_token_path(root: Path, plan: SegmentPlan, target: str) -> None:
    if (refusal := token_path_refusal(plan, target)) is not None:
        raise EngineBuildError(f"{root} {refusal}")


def _warm(
    bundles: Sequence[Bundle], target: str, settings: CompileSettings, listener: BuildListener, announce: Announce
) -> CompiledTarget:
    for bundle in bundles:
        _check_token_path(bundle.root, bundle.manifest.plan, target)
    begin = perf_counter()
    seconds: dict[str, float] = {}
    for bundle in bundles:
        warmed = warm_engines(bundle, target, settings.device or "cuda", listener, announce)
        seconds |= {network_name(name, bundle.label): taken for name, taken in warmed.items()}
    return CompiledTarget(target=target, seconds=seconds, elapsed=perf_counter() - begin, up_to_date=(), bytes=0)
