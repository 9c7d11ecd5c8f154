"""Memory of a running bundle, and the cost of switching between its engines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dyexport.engines.base import WeightSpan
from dyexport.engines.switching import SwitchingEngine
from dyexport.runtime.conditioning import Conditioner


@dataclass(frozen=True, kw_only=True)
class EngineResidency:
    """Memory and activations of one engine.

    weight_bytes        bytes of weights that it reads when active
    activation_seconds  total of its ``activations``
    """

    segment: int
    active: bool
    weight_bytes: int
    activations: int
    activation_seconds: float


@dataclass(frozen=True, kw_only=True)
class Switch:
    """Switches between two segments, and their total seconds; ``source`` None: the first engine after loading."""

    source: int | None
    target: int
    count: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Residency:
    """Bytes now, and seconds since the bundle was loaded.

    weight_bytes     weights of the active engines and their conditioning; shared bytes count once
    process_bytes    proportional set size of the process; None where the system does not report it
    device_bytes     GPU memory in use by all processes, activations included; None on a CPU
    run_seconds      inside engines, conditioning included
    outside_seconds  the rest of each step: routing, switching, moving tensors
    """

    engines: tuple[EngineResidency, ...]
    switches: tuple[Switch, ...]
    weight_bytes: int
    process_bytes: int | None
    device_bytes: int | None
    run_seconds: float
    outside_seconds: float

    @property
    def switch_overhead(self) -> float:
        """Share of the time spent outside engines, in [0, 1]."""
        total = self.run_seconds + self.outside_seconds
        return self.outside_seconds / total if total else 0.0


def measure(engine: SwitchingEngine, conditioner: Conditioner, *, step_seconds: float) -> Residency:
    """Measure a running bundle; ``step_seconds`` is the total time of all steps so far."""
    clock = engine.clock
    run_seconds = clock.run_seconds + conditioner.seconds
    engines = (
        EngineResidency(
            segment=index,
            active=each.active,
            weight_bytes=distinct_bytes(each.weights),
            activations=clock.activations[index],
            activation_seconds=clock.activation_seconds[index],
        )
        for index, each in enumerate(engine.engines)
    )
    switches = (
        Switch(source=source, target=target, count=cost.count, seconds=cost.seconds)
        for (source, target), cost in clock.switches.items()
    )
    return Residency(
        engines=tuple(engines),
        switches=tuple(switches),
        weight_bytes=weight_bytes(engine, conditioner),
        process_bytes=process_bytes(),
        device_bytes=device_bytes(str(conditioner.device)),
        run_seconds=run_seconds,
        outside_seconds=max(step_seconds - run_seconds, 0.0),
    )


def weight_bytes(engine: SwitchingEngine, conditioner: Conditioner) -> int:
    """Return the bytes of the resident weights; bytes that engines share count once."""
    active = [each.weights for each in (*engine.engines, conditioner.engine) if each.active]
    if engine.shares_weights:
        return distinct_bytes(span for spans in active for span in spans)
    return sum(distinct_bytes(spans) for spans in active)


def distinct_bytes(spans: Iterable[WeightSpan]) -> int:
    """Count the bytes that the spans cover, overlaps once."""
    total, path, reached = 0, None, 0
    for span in sorted(spans, key=lambda span: (span.path, span.offset)):
        start = max(span.offset, reached) if span.path == path else span.offset
        end = span.offset + span.length
        total += max(end - start, 0)
        path, reached = span.path, max(start, end)
    return total


def process_bytes(rollup: Path = Path("/proc/self/smaps_rollup")) -> int | None:
    """Return the proportional set size of this process, in which a page of n processes counts 1/n."""
    try:
        lines = rollup.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), None)


def device_bytes(device: str) -> int | None:
    """Return the memory in use on a GPU as its driver reports it, since not only torch allocates. None for the CPU."""
    import torch

    if not device.startswith("cuda"):
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free
