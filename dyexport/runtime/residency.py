"""What a running bundle holds in memory, and what switching between its engines has cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dyexport.engines.base import WeightSpan
from dyexport.engines.switching import SwitchingEngine
from dyexport.runtime.conditioning import Conditioner


@dataclass(frozen=True, kw_only=True)
class EngineResidency:
    """``weight_bytes`` is what the engine reads when active; ``activation_seconds`` the total over ``activations``."""

    segment: int
    active: bool
    weight_bytes: int
    activations: int
    activation_seconds: float


@dataclass(frozen=True, kw_only=True)
class Switch:
    """``count`` switches between two segments (from None: the first), and the seconds they took together."""

    source: int | None
    target: int
    count: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Residency:
    """Bytes now, and seconds since the bundle was loaded.

    weight_bytes     of the active engines and their conditioning; bytes that engines share count once
    process_bytes    proportional set size of the whole process; None where the system does not tell
    device_bytes     of the GPU's memory that are in use, by anyone, activations included; None on a CPU
    run_seconds      inside engines, conditioning included
    outside_seconds  everything else in a step: routing, switching, moving tensors
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
        """Share of the time that engines do not account for, in [0, 1]."""
        total = self.run_seconds + self.outside_seconds
        return self.outside_seconds / total if total else 0.0


def measure(engine: SwitchingEngine, conditioner: Conditioner, *, step_seconds: float) -> Residency:
    """``step_seconds`` is the time in all steps so far, engines and everything around them."""
    clock = engine.clock
    run_seconds = clock.run_seconds + conditioner.seconds
    active = [each.weights for each in (*engine.engines, conditioner.engine) if each.active]
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
    mapped = distinct_bytes(span for spans in active for span in spans)
    return Residency(
        engines=tuple(engines),
        switches=tuple(switches),
        weight_bytes=mapped if engine.shares_weights else sum(distinct_bytes(spans) for spans in active),
        process_bytes=process_bytes(),
        device_bytes=device_bytes(str(conditioner.device)),
        run_seconds=run_seconds,
        outside_seconds=max(step_seconds - run_seconds, 0.0),
    )


def distinct_bytes(spans: Iterable[WeightSpan]) -> int:
    """Bytes that the spans cover, overlaps counted once."""
    total, path, reached = 0, None, 0
    for span in sorted(spans, key=lambda span: (span.path, span.offset)):
        start = max(span.offset, reached) if span.path == path else span.offset
        end = span.offset + span.length
        total += max(end - start, 0)
        path, reached = span.path, max(start, end)
    return total


def process_bytes(rollup: Path = Path("/proc/self/smaps_rollup")) -> int | None:
    """Proportional set size: a page that several processes map counts in parts."""
    try:
        lines = rollup.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), None)


def device_bytes(device: str) -> int | None:
    """Memory in use on a GPU, by the driver's account: not only torch allocates there. None for the CPU."""
    import torch

    if not device.startswith("cuda"):
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free
