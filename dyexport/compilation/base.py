"""The contract of compilers: one network of a bundle, as its ONNX graph, to one engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from dyexport.bundle.manifest import DENSE_CONDITIONING
from dyexport.bundle.plan import Segment, SegmentPlan
from dyexport.bundle.reader import Bundle
from dyexport.bundle.spec import ModelSpec
from dyexport.bundle.tables import TokenStats, WidthTable
from dyexport.digests import sha256_of
from dyexport.engines.base import EngineIO, WeightSpan
from dyexport.engines.onnx_file import graph_io, graph_weights, read_graph
from dyexport.progress import Progress


@dataclass(frozen=True, kw_only=True)
class BundleNetworks:
    """The description of a bundle's networks, also of a bundle that is not assembled yet.

    ``separate_dense`` says that the dense network has its own conditioning network.
    """

    spec: ModelSpec
    plan: SegmentPlan
    widths: WidthTable
    stats: TokenStats | None
    separate_dense: bool

    @classmethod
    def of(cls, bundle: Bundle) -> BundleNetworks:
        manifest = bundle.manifest
        separate = any(engine.network == DENSE_CONDITIONING for engine in manifest.engines)
        return cls(
            spec=manifest.model,
            plan=manifest.plan,
            widths=bundle.widths,
            stats=bundle.token_stats,
            separate_dense=separate,
        )


@dataclass(frozen=True, kw_only=True)
class EngineJob:
    """A network to compile: its ONNX graph, with the weight store next to it, and what the bundle says of it.

    ``segment`` is the segment that the network runs, None for a conditioning network.
    """

    network: str
    segment: Segment | None
    graph: Path
    networks: BundleNetworks

    @cached_property
    def io(self) -> EngineIO:
        """Inputs and outputs of the graph."""
        return graph_io(read_graph(self.graph), self.graph)

    @cached_property
    def weights(self) -> tuple[WeightSpan, ...]:
        """Ranges of the weight store that the graph reads."""
        return graph_weights(read_graph(self.graph), self.graph)

    @property
    def graph_sha256(self) -> str:
        return sha256_of(self.graph)


class Compiler(Protocol):
    """A compiler for one target and one set of options. It is pickled to worker processes.

    ``parallel`` is False if engines must be built one at a time: the builder measures kernels, or uses all cores.
    """

    @property
    def target(self) -> str: ...

    @property
    def parallel(self) -> bool: ...

    def version(self) -> str:
        """Return the version of the builder.

        Raises ``MissingDependencyError`` if it is not installed, ``EngineBuildError`` if it cannot be used here.
        """

    def inputs(self, job: EngineJob) -> Mapping[str, Any]:
        """Return a JSON value of what an engine depends on, apart from its graph, its weights and the builder."""

    def is_current(self, job: EngineJob, engine: Path) -> bool:
        """Tell whether a bundle's engine file, or the description next to it, is of this builder, graph and request."""

    def other_options(self, job: EngineJob, engine: Path) -> tuple[str, ...]:
        """Return the options by which a bundle's engine was compiled and that this request replaces, as written."""

    def compile(self, job: EngineJob, out: Path, progress: Progress) -> None:
        """Write the engine and its description into the new directory ``out``. Raises ``EngineBuildError``."""
