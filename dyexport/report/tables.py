"""Tables of the page: blocks, bytes, the machine."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np

from dyexport.bench.environment import Environment
from dyexport.bundle.manifest import CONDITIONING, DENSE, DENSE_CONDITIONING, Manifest
from dyexport.bundle.plan import Segment
from dyexport.bundle.reader import Bundle
from dyexport.report.contents import Table
from dyexport.report.costs import StepCosts
from dyexport.report.trajectory import Trajectory

UNITS = ("B", "kB", "MB", "GB", "TB")


def layers_table(bundle: Bundle) -> Table:
    """Return one row for each block: units and tokens as gated, averaged over t, and as they are in the engines."""
    widths, stats, segments = bundle.widths, bundle.token_stats, bundle.manifest.plan.segments
    measure = widths.measure()  # (T,)
    heads, groups = (np.tensordot(measure, units.mean(axis=-1), axes=1) for units in (widths.heads, widths.groups))
    points = np.linspace(widths.start, widths.end, 257)
    tokens = None if stats is None else stats.mean_fraction(points).mean(axis=0)  # (L,)
    rows = []
    for block in range(widths.heads.shape[1]):
        kept = ("-", "-") if tokens is None else (f"{tokens[block]:.0%}", _paths(segments, block))
        rows.append(
            (
                str(block),
                f"{heads[block]:.0%}",
                _range([len(segment.heads[block]) for segment in segments], widths.heads.shape[-1]),
                f"{groups[block]:.0%}",
                _range([len(segment.groups[block]) for segment in segments], widths.groups.shape[-1]),
                *kept,
            )
        )
    header = ("block", "heads on", "in engines", "groups on", "in engines", "tokens kept", "token path")
    note = "On: the mean over t of what the gates keep. In engines: units of the narrowest and of the widest engine."
    return Table(title="Blocks", header=header, rows=tuple(rows), note=note)


def engines_table(bundle: Bundle) -> Table:
    """Return one row for each engine: its interval of t, its units, and what decides inside the interval."""
    widths = bundle.widths
    rows = tuple(
        (
            str(index),
            f"{segment.start:.4g} to {segment.end:.4g}",
            f"{(segment.end - segment.start) / (widths.end - widths.start):.0%}",
            f"{sum(map(len, segment.heads)) / widths.heads[0].size:.0%}",
            f"{sum(map(len, segment.groups)) / widths.groups[0].size:.0%}",
            str(segment.gate_size),
        )
        for index, segment in enumerate(bundle.manifest.plan.segments)
    )
    note = "Gates: units that are on in a part of the interval only; the engine multiplies them by 0 or 1."
    return Table(title="Engines", header=("engine", "t", "of t", "heads", "groups", "gates"), rows=rows, note=note)


def timeline_table(trajectory: Trajectory, costs: StepCosts, engines: int) -> Table:
    """Return one row for each engine: how many steps it serves, and the FLOPs of one."""
    rows = []
    for index in range(engines):
        served = [step.index for step in trajectory.steps if step.segment == index]
        cost = f"{fmean(costs.steps[place].executed for place in served):.1%}" if served else "-"
        which = f"{served[0] + 1} to {served[-1] + 1}" if served else "none"
        rows.append((str(index), which, f"{len(served)} of {len(trajectory.steps)}", cost))
    header = ("engine", "steps", "served", "FLOPs of a step")
    return Table(
        title="Steps of each engine", header=header, rows=tuple(rows), note="FLOPs are of the dense network's."
    )


def bytes_table(bundle: Bundle) -> Table:
    """Return the bytes of a bundle by what they are for. Files of one target are its engines."""
    manifest = bundle.manifest
    sizes = {name: record.bytes for name, record in manifest.files.items()}
    engines = {engine.path: engine for engine in manifest.engines}
    targets = dict.fromkeys(engine.target for engine in manifest.engines)
    rows = []
    for target in targets:
        for what, networks in _kinds(manifest):
            found = [sizes[path] for path, e in engines.items() if e.target == target and e.network in networks]
            if found:
                rows.append((f"{target}: {what}", str(len(found)), megabytes(sum(found))))
    rest = {name: size for name, size in sizes.items() if name not in engines}
    rows += [(name, "1", megabytes(size)) for name, size in sorted(rest.items(), key=lambda item: -item[1])]
    rows.append(("all files", str(len(sizes)), megabytes(sum(sizes.values()))))
    plan = manifest.plan
    note = (
        f"Weights of the engines and their conditioning: {megabytes(plan.disk_bytes)} with every byte once, "
        f"{megabytes(plan.resident_bytes)} with a copy for each engine."
    )
    return Table(title="Bytes", header=("what", "files", "size"), rows=tuple(rows), note=note)


def _kinds(manifest: Manifest) -> list[tuple[str, frozenset[str]]]:
    own = {CONDITIONING, DENSE, DENSE_CONDITIONING}
    segments = frozenset(engine.network for engine in manifest.engines) - own
    return [
        ("engines", segments),
        ("conditioning", frozenset({CONDITIONING})),
        ("dense, for comparison", frozenset({DENSE, DENSE_CONDITIONING})),
    ]


def environment_table(machine: Environment, title: str) -> Table:
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items() if version is not None)
    rows = [
        ("device", f"{machine.device_name} ({machine.device})"),
        ("CPU", f"{machine.cpu}, {machine.threads} thread{'s' if machine.threads > 1 else ''} used"),
        ("system", machine.system),
        ("software", f"Python {machine.python}, {versions}"),
        *([("driver", machine.driver)] if machine.driver else []),
    ]
    return Table(title=title, header=(), rows=tuple(rows))


def megabytes(count: float) -> str:
    """Return a size in decimal units, with three digits."""
    for unit in UNITS[:-1]:
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} {UNITS[-1]}"


def _range(counts: Sequence[int], units: int) -> str:
    low, high = min(counts), max(counts)
    return f"{low if low == high else f'{low} to {high}'} of {units}"


def _paths(segments: Sequence[Segment], block: int) -> str:
    return ", ".join(dict.fromkeys(segment.token_paths[block] for segment in segments))
