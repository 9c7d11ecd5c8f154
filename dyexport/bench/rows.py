"""Results of ``dyexport bench``: one row for each variant in each case, and the machine that they were measured on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dyexport.bench.energy import Energy
from dyexport.bench.environment import Conditions, Environment
from dyexport.bench.statistics import Ratio, Timing

Unit = Literal["step", "trajectory", "pipeline"]
STOCK = "diffusers"  # target of the rows that run no bundle
DYNAMIC, STATIC, DENSE, CONDITIONING = "dynamic", "static", "dense", "conditioning"
BUNDLE = (DYNAMIC, STATIC)  # variants that are the whole bundle, named after its widths
COMPILED, EAGER = "torch.compile", "eager"


@dataclass(frozen=True, kw_only=True)
class SegmentShare:
    """Contents of one engine: its interval of t, its share of the trajectory, and mean shares of what it keeps."""

    start: float
    end: float
    share: float
    heads: float
    groups: float
    tokens: float


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory that a variant adds to a fresh process by running each of its engines once.

    resident_bytes      proportional set size, weights and activations; None if the system cannot tell
    shared_bytes        the same with one mapped copy of the weights; None where engines cannot share them
    device_bytes        peak memory of the process on the GPU by NVML, whatever allocated it, CUDA's context included
    torch_device_bytes  peak that torch's own allocator had in use
    device_reason       why there are no ``device_bytes``
    """

    resident_bytes: int | None
    shared_bytes: int | None = None
    device_bytes: int | None = None
    torch_device_bytes: int | None = None
    device_reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """Measurements of one variant in one case.

    target             engine format, or ``diffusers``
    variant            ``dynamic`` or ``static``: a bundle averaged over the trajectory; ``segment N``: one of its
                       engines; ``conditioning``: its share of a step; ``dense``, ``torch.compile``, ``eager``: the
                       whole model
    unit               what a call is: a denoising ``step``, a sampling loop (``trajectory``), or a ``pipeline`` from
                       prompts to pixels
    size               (height, width) in pixels; None: that of the bundle
    timing             of one call once everything is loaded; a step includes its share of the conditioning
    calls              timed calls
    first_call         seconds of the first call, which loads the engine
    samples_per_second batch elements per second, over all steps of a trajectory
    over_dense         speed-up over the dense network of the same target
    energy             per sample
    parts              seconds that a pipeline spends in text encoders and VAE, by component
    """

    target: str
    variant: str
    unit: Unit
    batch: int
    size: tuple[int, int] | None
    timing: Timing
    calls: int
    first_call: float | None
    samples_per_second: float
    energy: Energy
    over_dense: Ratio | None = None
    over_compiled: Ratio | None = None
    over_eager: Ratio | None = None
    memory: Memory | None = None
    segment: SegmentShare | None = None
    parts: Mapping[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """Results of one run. Compare only rows of the same case: batch and size.

    flops_ratio           lambda: attention and MLP as gated, averaged over t; network_flops_ratio: static layers too
    executed_flops_ratio  as the graphs run: unions of units, token capacities, routers
    switch_overhead       share of a sampling step not spent inside an engine, all engines being resident, by target;
                          None on a GPU, where engines run asynchronously
    others                share of CPU time used by other processes meanwhile; torch suffers most from it
    before, after         temperature and clocks around the timing
    """

    model: str
    steps: int
    flops_ratio: float
    network_flops_ratio: float
    executed_flops_ratio: float
    rows: tuple[Row, ...]
    switch_overhead: Mapping[str, float | None]
    others: float | None
    before: Conditions
    after: Conditions
    environment: Environment
    warnings: tuple[str, ...]

    @property
    def headline(self) -> Row:
        """The bundle in the first case, on the first target."""
        return next(row for row in self.rows if row.variant in BUNDLE and row.unit == "step")

    @property
    def realized(self) -> float | None:
        """Speed-up over dense x network_flops_ratio: 1 if time falls as much as FLOPs do."""
        speedup = trusted(self.headline.over_dense)
        return None if speedup is None else speedup * self.network_flops_ratio


def trusted(ratio: Ratio | None) -> float | None:
    """Return the value of a ratio; None if there is none that can be trusted."""
    return None if ratio is None else ratio.value


def payload(report: BenchReport) -> dict[str, Any]:
    """Return the contents of ``bench --json``: the headline figures, then everything."""
    first = report.headline
    return {
        "speedup_vs_dense": trusted(first.over_dense),
        "speedup_vs_torch_compile": trusted(first.over_compiled),
        "speedup_vs_eager": trusted(first.over_eager),
        "realized": report.realized,
        "p50": first.timing.p50,
        "p90": first.timing.p90,
        "p99": first.timing.p99,
        "samples_per_second": first.samples_per_second,
        "resident_bytes": None if first.memory is None else first.memory.resident_bytes,
        "device_bytes": None if first.memory is None else first.memory.device_bytes,
        "joules_per_sample": first.energy.joules,
        **asdict(report),
    }
