"""Assembly of a bundle from the outputs of its stages, in one atomic step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

from dyexport import __version__
from dyexport.bundle.golden import GOLDEN
from dyexport.bundle.manifest import SCHEMA_VERSION, EngineRecord, FileRecord, Manifest, Reference
from dyexport.bundle.manifest_file import MANIFEST, RANGES, TOKENS, WIDTHS, manifest_text, read_manifest
from dyexport.bundle.plan import SegmentPlan
from dyexport.bundle.reader import Bundle
from dyexport.bundle.targets import ONNX, TARGETS
from dyexport.calibration.quantization import Ranges
from dyexport.compilation.install import files_of_engines
from dyexport.compilation.jobs import ENGINES
from dyexport.digests import remember
from dyexport.errors import BundleError, StorageError
from dyexport.exporters.onnx_graph import STORE
from dyexport.files import hard_linked, remove, replacing, storage_errors
from dyexport.pipeline.export_stages import GRAPHS, CalibratedModel
from dyexport.pipeline.output import STAGING, replaced_settings, staged
from dyexport.pipeline.run import Run
from dyexport.stages.file_records import damage, describe, digest_of
from dyexport.stages.ledger import Outcome


class Source(NamedTuple):
    """Source of one file of the bundle, and its expected hash; ``linked``: hard-link it instead of copying."""

    path: Path
    record: FileRecord
    linked: bool = False

    @classmethod
    def of(cls, outcome: Outcome, name: str = ".", *, linked: bool = False) -> Source:
        return cls(outcome.path / name, outcome.files[name], linked)


def assemble_bundle(
    run: Run,
    model: CalibratedModel,
    plan: SegmentPlan,
    ranges: Outcome | None,
    store: Outcome,
    graphs: Mapping[str, Outcome],
    engines: Mapping[str, Mapping[str, Outcome]],
    golden: Outcome,
) -> Manifest:
    """Put the outputs of all stages together at ``settings.out``; ``engines`` are TensorRT plans by target."""
    settings, start = run.settings, perf_counter()
    linked = store.files["."].bytes >= run.link_store_from
    files = {f"{GRAPHS}/{STORE}": Source.of(store, linked=linked)}
    files |= {name: Source.of(model.calibrated, name) for name in (WIDTHS, TOKENS) if name in model.calibrated.files}
    files[GOLDEN] = Source.of(golden)
    files |= {f"{GRAPHS}/{outcome.path.name}": Source.of(outcome) for outcome in graphs.values()}
    paths = {(ONNX, name): f"{GRAPHS}/{outcome.path.name}" for name, outcome in graphs.items()}
    for target, plans in engines.items():
        for name, outcome in plans.items():
            folder = f"{ENGINES}/{target}/{name}"
            files |= {f"{folder}/{part}": Source.of(outcome, part) for part in outcome.files}
            paths[target, name] = f"{folder}/{TARGETS[target].file}"
    compiled = compiled_engines(settings.out, {name: source.record for name, source in files.items()}, set(engines))
    paths |= {(engine.target, engine.network): engine.path for engine, _ in compiled}
    files |= {name: Source(settings.out / name, record) for _, records in compiled for name, record in records.items()}
    if ranges is not None:
        files[RANGES] = Source.of(ranges)
        plan = plan.model_copy(update={"quantization_errors": Ranges.read(ranges.path).errors})
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        dyexport_version=__version__,
        model=model.spec,
        budget=settings.budget,
        widths=settings.planned_widths,
        plan=plan,
        engines=tuple(EngineRecord(target=t, network=name, path=path) for (t, name), path in paths.items()),
        reference=Reference(path=os.path.relpath(model.path, settings.out), sha256=model.calibrated.digest),
        metrics=dict(model.metrics),
        files={name: source.record for name, source in sorted(files.items())},
    )
    run.replaced = replaced_settings(settings.out, manifest)
    reused = assemble(settings.out, manifest, files)
    seconds = perf_counter() - start
    outcome = Outcome(
        path=settings.out,
        files=manifest.files,
        digest=digest_of(manifest.model_dump(mode="json")),
        reused=reused,
        seconds=seconds,
        made_in=None if reused else round(seconds, 3),
    )
    run.ledger.note("bundle", outcome)
    return manifest


def compiled_engines(
    out: Path, files: Mapping[str, FileRecord], targets: Collection[str]
) -> list[tuple[EngineRecord, dict[str, FileRecord]]]:
    """Return the engines of other ``targets`` that the bundle at ``out`` has for the same graphs, and their files.

    ``dyexport compile`` adds such engines to a bundle; a build that leaves its graphs as they are keeps them, unless
    their files are damaged.
    """
    try:
        old = read_manifest(out / MANIFEST)
    except BundleError:
        return []
    if _graphs(old.files) != _graphs(files):
        return []
    engines = [engine for engine in old.engines if engine.target not in {ONNX, *targets}]
    kept = [(engine, {name: old.files[name] for name in files_of_engines(old, [engine])}) for engine in engines]
    damaged = {
        engine.target
        for engine, records in kept
        if any(any(damage(out / name, {".": record})) for name, record in records.items())
    }
    return [(engine, records) for engine, records in kept if engine.target not in damaged]


def _graphs(files: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    return {name: record for name, record in files.items() if name.startswith(f"{GRAPHS}/")}


def assemble(out: Path, manifest: Manifest, files: Mapping[str, Source]) -> bool:
    """Make ``out`` this bundle; return whether it was so already.

    A kill at any moment leaves the old bundle or the new one. Files that neither of them names stay where they are. The
    source of a linked file becomes a symbolic link to the file in the bundle.
    """
    current = _is_current(out, manifest)
    with storage_errors(out):
        if current:
            remove(out / STAGING)  # of a build that was killed when all was done
        else:
            with staged(out, manifest.files) as staging:
                _fill(staging, out, files)
                (staging / MANIFEST).write_bytes(manifest_text(manifest))
        linked = {name: source for name, source in files.items() if source.linked}
        for name, source in linked.items():
            _leave_link(source.path, out / name)
            if not current:
                remember(out / name, source.record.sha256)
    return current


def _is_current(out: Path, manifest: Manifest) -> bool:
    try:
        return Bundle.open(out).manifest == manifest
    except BundleError:
        return False


def _fill(staging: Path, out: Path, files: Mapping[str, Source]) -> None:
    """Copy files, or hard-link those that are linked."""
    for name, source in files.items():
        place = staging / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.linked and _linked(source.path, place, out / name):
            continue
        shutil.copyfile(source.path, place)
        if describe(place)["."] != source.record:
            raise StorageError(f"{place} was not written as it should be; check the disk, then repeat")


def _linked(path: Path, place: Path, final: Path) -> bool:
    """Hard-link a file into the staging folder; False if another bundle has it or it is on another disk."""
    if path.is_symlink() and path.resolve() != final.resolve():
        return False
    return hard_linked(path.resolve(), place)


def _leave_link(path: Path, final: Path) -> None:
    """Replace a linked file by a symbolic link: ONNX's checker refuses external data with two hard links."""
    if path.is_symlink() or not path.samefile(final):
        return
    with replacing(path, follow_symlinks=False) as link:
        link.symlink_to(os.path.relpath(final.resolve(), path.parent.resolve()))
