"""Assembly of a bundle from the outputs of its stages, in one atomic step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

from dyexport import __version__
from dyexport.bundle.golden import GOLDEN
from dyexport.bundle.manifest import (
    DENSE,
    DENSE_CONDITIONING,
    SCHEMA_VERSION,
    EngineRecord,
    FileRecord,
    Manifest,
    Reference,
    budget_folder,
)
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
from dyexport.files import hard_linked, remove, replacing, storage_errors, write_atomically
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


@dataclass(frozen=True, kw_only=True)
class BudgetParts:
    """The outputs of the stages of one budget; ``engines`` are compiled ones by target and network."""

    run: Run
    model: CalibratedModel
    plan: SegmentPlan
    ranges: Outcome | None
    golden: Outcome
    graphs: Mapping[str, Outcome]
    engines: Mapping[str, Mapping[str, Outcome]]


def assemble_bundle(run: Run, store: Outcome, parts: Sequence[BudgetParts]) -> Manifest:
    """Put the outputs of all stages together at ``settings.out``; return the manifest of the default budget.

    ``parts`` has the default budget first.
    """
    settings, start = run.settings, perf_counter()
    linked = store.files["."].bytes >= run.link_store_from
    stored = {f"{GRAPHS}/{STORE}": Source.of(store, linked=linked)}
    default, *others = parts
    files = {**stored, **_files(default, None)}
    paths, dense = _engine_paths(default), _dense_engines(default)
    if not settings.budgets:
        kept = compiled_engines(settings.out, _records(files), set(default.engines))
        paths |= {(engine.target, engine.network): engine.path for engine, _ in kept}
        files |= {name: Source(settings.out / name, record) for _, found in kept for name, record in found.items()}
    for other in others:
        files |= _other_budget(other, stored | {path: files[path] for path in dense.values()}, dense)
    manifest = _manifest(default, None, paths, files)
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


def _other_budget(
    parts: BudgetParts, shared: Mapping[str, Source], dense: Mapping[tuple[str, str], str]
) -> dict[str, Source]:
    """Return the files of a budget that is not the default one, and its manifest, which it writes.

    ``shared`` are files of the default budget, among them the engines ``dense``.
    """
    assert parts.run.settings.budget is not None
    folder = budget_folder(parts.run.settings.budget)
    files = _files(parts, folder)
    manifest = _manifest(parts, folder, {**dense, **_engine_paths(parts)}, {**shared, **files})
    path = parts.run.settings.work / parts.run.file(MANIFEST)
    write_atomically(path, manifest_text(manifest))
    return {**files, f"{folder}/{MANIFEST}": Source(path, describe(path)["."])}


def _manifest(
    parts: BudgetParts, folder: str | None, paths: Mapping[tuple[str, str], str], files: Mapping[str, Source]
) -> Manifest:
    settings, model, plan = parts.run.settings, parts.model, parts.plan
    if parts.ranges is not None:
        plan = plan.model_copy(update={"quantization_errors": Ranges.read(parts.ranges.path).errors})
    reference = os.path.relpath(model.path, settings.out / (folder or ""))
    return Manifest(
        schema_version=SCHEMA_VERSION,
        dyexport_version=__version__,
        model=model.spec,
        budget=settings.budget,
        budgets=tuple(sorted(settings.budgets)),
        folder=folder,
        widths=settings.planned_widths,
        plan=plan,
        engines=tuple(EngineRecord(target=t, network=name, path=path) for (t, name), path in paths.items()),
        reference=Reference(path=reference, sha256=model.calibrated.digest),
        metrics=dict(model.metrics),
        files=dict(sorted(_records(files).items())),
    )


def _records(files: Mapping[str, Source]) -> dict[str, FileRecord]:
    return {name: source.record for name, source in files.items()}


def _files(parts: BudgetParts, folder: str | None) -> dict[str, Source]:
    """Return the files of one budget by their place in the bundle; tables and golden data are in ``folder``."""
    calibrated, prefix = parts.model.calibrated, "" if folder is None else f"{folder}/"
    files = {f"{prefix}{name}": Source.of(calibrated, name) for name in (WIDTHS, TOKENS) if name in calibrated.files}
    files[f"{prefix}{GOLDEN}"] = Source.of(parts.golden)
    if parts.ranges is not None:
        files[f"{prefix}{RANGES}"] = Source.of(parts.ranges)
    files |= {f"{GRAPHS}/{outcome.path.name}": Source.of(outcome) for outcome in parts.graphs.values()}
    for target, engines in parts.engines.items():
        for engine in engines.values():
            files |= {f"{ENGINES}/{target}/{engine.path.name}/{part}": Source.of(engine, part) for part in engine.files}
    return files


def _engine_paths(parts: BudgetParts) -> dict[tuple[str, str], str]:
    """Return the place of each engine, by target and network."""
    paths = {(ONNX, name): f"{GRAPHS}/{outcome.path.name}" for name, outcome in parts.graphs.items()}
    for target, engines in parts.engines.items():
        for name, outcome in engines.items():
            paths[target, name] = f"{ENGINES}/{target}/{outcome.path.name}/{TARGETS[target].file}"
    return paths


def _dense_engines(parts: BudgetParts) -> dict[tuple[str, str], str]:
    """Return the places of the engines of the dense network, which all budgets share."""
    return {key: path for key, path in _engine_paths(parts).items() if key[1] in (DENSE, DENSE_CONDITIONING)}


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
