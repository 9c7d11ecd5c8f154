"""Engines as stages of a ledger. A build and ``dyexport compile`` make them by this code, from ONNX graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from dyexport.bundle.manifest import DENSE
from dyexport.bundle.plan import segment_name
from dyexport.bundle.reader import Bundle
from dyexport.bundle.tables import UnitOrder
from dyexport.bundle.targets import ONNX
from dyexport.compilation.base import BundleNetworks, Compiler, EngineJob
from dyexport.engines.base import WeightSpan
from dyexport.progress import Progress
from dyexport.stages.file_records import digest_of, digest_of_spans
from dyexport.stages.ledger import Ledger, Outcome, Stage
from dyexport.stages.workers import WorkerPool, max_workers

ENGINES = "engines"


def make_jobs(networks: BundleNetworks, graphs: Mapping[str, Path]) -> list[EngineJob]:
    """Return the jobs of a bundle that may not be assembled yet; ``graphs`` are its ONNX graphs by network."""
    from dyexport.slicing.slicer import dense_segment

    segments = {segment_name(index): segment for index, segment in enumerate(networks.plan.segments)}
    segments[DENSE] = dense_segment(networks.spec, UnitOrder.of(networks.widths))
    return [
        EngineJob(network=name, segment=segments.get(name), graph=path, networks=networks)
        for name, path in graphs.items()
    ]


def bundle_jobs(bundle: Bundle) -> list[EngineJob]:
    """Return the jobs of an opened bundle. Networks that all budgets share are those of the default budget."""
    own = {engine.network for engine in bundle.manifest.own_engines}
    graphs = {name: path for name, path in bundle.engine_paths(ONNX).items() if name in own}
    return make_jobs(BundleNetworks.of(bundle), graphs)


def compile_jobs(
    ledger: Ledger,
    compiler: Compiler,
    jobs: Sequence[EngineJob],
    progress: Callable[[str], Progress],
    *,
    memory: int | None = None,
    at_once: int | None = None,
    label: str = "",
) -> dict[str, Outcome]:
    """Compile every job that the ledger does not have, several at a time; return the outcomes by network.

    ``progress`` returns where a stage reports its progress. ``memory`` bounds the bytes that all builders take
    (default: what is free); ``at_once`` is the number of builders instead. ``label`` is that of one of several budgets.
    """
    pool = WorkerPool(builders_at_once(compiler, jobs, memory, at_once))
    stages = [engine_stage(compiler, job, pool, progress, label) for job in jobs]
    outcomes = pool.run([partial(ledger.run, stage) for stage in stages])
    return {job.network: outcome for job, outcome in zip(jobs, outcomes, strict=True)}


def builders_at_once(
    compiler: Compiler, jobs: Sequence[EngineJob], memory: int | None = None, at_once: int | None = None
) -> int:
    """Return how many engines ``compile_jobs`` compiles at a time."""
    if not compiler.parallel:
        return 1
    if at_once is not None:
        return max(min(at_once, len(jobs)), 1)
    return max_workers([sum(span.length for span in job.weights) for job in jobs], memory)


def engine_stage(
    compiler: Compiler, job: EngineJob, pool: WorkerPool, progress: Callable[[str], Progress], label: str = ""
) -> Stage:
    """Return the stage of one engine: it depends on the graph, its own weights, the builder and the request."""
    name = f"{compiler.target} {job.network}"
    full_name = f"{compiler.target} {network_name(job.network, label)}"
    inputs = {
        "graph": digest_of({".": job.graph_sha256}),  # as a ledger identifies a stage of one file
        "weights": weights_digest(job.weights),
        "builder": compiler.version(),
        **compiler.inputs(job),
    }

    def make(out: Path) -> None:
        pool.submit(full_name, run_compiler, compiler, job, out, progress=progress(name))

    folder = engine_folder(job.network, label)
    return Stage(name=full_name, output=f"{ENGINES}/{compiler.target}/{folder}", inputs=inputs, make=make)


def network_name(network: str, label: str = "") -> str:
    """Return the name of a network in reports; ``label`` is that of one of several budgets."""
    return f"{network}@{label}" if label else network


def engine_folder(network: str, label: str = "") -> str:
    """Return the name of the folder of one engine; ``label`` is that of one of several budgets."""
    return f"{label}-{network}" if label else network


def run_compiler(compiler: Compiler, job: EngineJob, out: Path, *, progress: Progress) -> None:
    """Compile one job. A function, so that a worker process can find it."""
    compiler.compile(job, out, progress)


def weights_digest(spans: Sequence[WeightSpan]) -> str:
    """Identify the bytes of weights."""
    places: dict[Path, list[tuple[int, int]]] = {}
    for span in spans:
        places.setdefault(span.path, []).append((span.offset, span.length))
    digests = [digest_of_spans(path, sorted(places[path])) for path in sorted(places)]
    return digests[0] if len(digests) == 1 else digest_of(digests)
