"""Writes a small, valid bundle with real graphs, and knows what it must compute."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from dyexport.bundle.graph_labels import labels_for
from dyexport.bundle.manifest import CONDITIONING, DENSE, SCHEMA_VERSION, EngineRecord, FileRecord, Manifest
from dyexport.bundle.manifest_file import MANIFEST, TOKENS, WIDTHS, manifest_text
from dyexport.bundle.plan import Segment, SegmentPlan, TokenPath, segment_name
from dyexport.bundle.spec import ModelSpec
from dyexport.bundle.tables import TokenStats, WidthTable
from dyexport.digests import sha256_of
from dyexport.runtime.routing import route
from tests.engines.tiny import (
    CHANNELS,
    CLASSES,
    DEPTH,
    FEATURES,
    GROUPS,
    HEADS,
    SIZE,
    Store,
    Weights,
    make_weights,
    modulate,
    reference,
    whole_segment,
    write_conditioning_onnx,
    write_onnx,
)
from tests.manifests import label

ROWS = 6


@dataclass(frozen=True, kw_only=True)
class TinyBundle:
    """A bundle at ``root``. Called like a transformer, it is the masked network the bundle must equal."""

    root: Path
    weights: Weights
    widths: WidthTable
    stats: TokenStats
    plan: SegmentPlan
    spec: ModelSpec

    def __call__(
        self, *, hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor
    ) -> SimpleNamespace:
        t = float(timestep[0])
        found = route(self.plan, self.widths, self.stats, t)
        row = self.widths.row(t)
        inputs = {"hidden_states": hidden_states, "modulation": modulate(self.weights, timestep, class_labels)}
        masks = self.widths.heads[row], self.widths.groups[row]
        return SimpleNamespace(**reference(self.weights, inputs, *masks, slots=found.slots or 0))


def make_widths(end: float, seed: int = 0) -> WidthTable:
    rng = np.random.default_rng(seed)
    heads, groups = rng.random((ROWS, DEPTH, HEADS)) < 0.6, rng.random((ROWS, DEPTH, GROUPS)) < 0.6
    heads[..., 0] = groups[..., 0] = True
    return WidthTable(grid=np.arange(ROWS) * end / ROWS, end=end, heads=heads, groups=groups)


def make_stats(end: float) -> TokenStats:
    """Blocks keep more tokens as t rises."""
    grid = np.linspace(0, end, 5)
    counts = np.array([2.0, 4.0, 6.0, 7.0, 8.0])[:, None, None] * np.ones((1, DEPTH, 2))
    return TokenStats(grid=grid, levels=np.array([0.5, 1.0]), counts=counts, mean=counts[..., 0], tokens=FEATURES)


def make_segment(widths: WidthTable, rows: slice, path: TokenPath, capacity: int) -> Segment:
    """The union of some rows; gated everywhere, or nowhere if it is one row."""
    edges = [*widths.grid, widths.end]
    kept = [
        tuple(tuple(np.flatnonzero(table[rows, block].any(axis=0)).tolist()) for block in range(DEPTH))
        for table in (widths.heads, widths.groups)
    ]
    gated = (rows.stop - rows.start > 1,) * DEPTH
    return Segment(
        start=edges[rows.start],
        end=edges[rows.stop],
        heads=kept[0],
        groups=kept[1],
        gated_heads=gated,
        gated_groups=gated,
        token_paths=(path,) * DEPTH,
        capacities=(capacity,) * DEPTH,
        slot_buckets=(1, 2, 4, 8) if path == "dynamic" else (),
    )


def make_plan(widths: WidthTable, segments: int, path: TokenPath = "all", capacity: int = FEATURES) -> SegmentPlan:
    bounds = np.linspace(0, ROWS, segments + 1).astype(int).tolist()
    rows = [slice(start, stop) for start, stop in pairwise(bounds)]
    return SegmentPlan(
        segments=tuple(make_segment(widths, each, path, capacity) for each in rows),
        flops_ratio=0.5,
        network_flops_ratio=0.6,
        executed_flops_ratio=0.6,
        disk_bytes=0,
        resident_bytes=0,
    )


def make_spec(objective: str = "ddpm", classes: int = CLASSES, *, pixels: bool = True) -> ModelSpec:
    config = {"sample_size": SIZE, "in_channels": CHANNELS, "out_channels": CHANNELS, "patch_size": 1}
    return ModelSpec(
        name="tiny",
        backbone="dit" if objective == "ddpm" else "sit",
        objective=objective,
        timestep_range=(0.0, 1000.0 if objective == "ddpm" else 1.0),
        latent_shape=(CHANNELS, SIZE, SIZE),
        tokens=FEATURES,
        classes=classes,
        pixel_space=pixels,
        config={**config, "num_embeds_ada_norm": classes, "norm_type": "ada_norm_zero"},
    )


def make_inputs(batch: int, t: float = 300.0, seed: int = 0) -> dict[str, torch.Tensor]:
    """What a pipeline gives the transformer."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, CHANNELS, SIZE, SIZE, generator=generator),
        "timestep": torch.full((batch,), t),
        "class_labels": torch.randint(CLASSES, (batch,), generator=generator),
    }


def predict(transformer: Any, t: float = 300.0) -> torch.Tensor:
    sample: torch.Tensor = transformer(**make_inputs(2, t=t)).sample
    return sample


def write_bundle(
    root: Path,
    *,
    objective: str = "ddpm",
    segments: int = 3,
    path: TokenPath = "all",
    capacity: int = FEATURES,
    pixels: bool = True,
) -> TinyBundle:
    spec = make_spec(objective, pixels=pixels)
    end = spec.timestep_range[1]
    widths, stats, weights = make_widths(end), make_stats(end), make_weights(end=end)
    plan = make_plan(widths, segments, path, capacity)
    for folder in ("graphs", "calibration"):
        (root / folder).mkdir(parents=True)
    widths.save(root / WIDTHS)
    stats.save(root / TOKENS)
    store = Store(root / "graphs" / "weights.bin")
    networks = {segment_name(index): segment for index, segment in enumerate(plan.segments)}
    for name, segment in {**networks, DENSE: whole_segment(gated=False)}.items():
        write_onnx(root / f"graphs/{name}.onnx", weights, segment, store)
    write_conditioning_onnx(root / f"graphs/{CONDITIONING}.onnx", weights, store)
    engines = [
        EngineRecord(target="onnx", network=name, path=f"graphs/{name}.onnx")
        for name in (*networks, DENSE, CONDITIONING)
    ]
    write_manifest(root, spec, plan, engines)
    return TinyBundle(root=root, weights=weights, widths=widths, stats=stats, plan=plan, spec=spec)


def write_manifest(root: Path, spec: ModelSpec, plan: SegmentPlan, engines: list[EngineRecord]) -> None:
    for engine in engines:
        if engine.target == "onnx":
            label(root / engine.path, labels_for(engine.network, spec, plan))
    files = [file for file in sorted(root.rglob("*")) if file.is_file() and file.name != MANIFEST]
    records = {
        str(file.relative_to(root)): FileRecord(sha256=sha256_of(file), bytes=file.stat().st_size) for file in files
    }
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        dyexport_version="0",
        model=spec,
        budget=0.5,
        plan=plan,
        engines=tuple(engines),
        reference=None,
        metrics={},
        files=records,
    )
    (root / MANIFEST).write_bytes(manifest_text(manifest))
