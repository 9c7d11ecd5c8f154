"""Assembly of a bundle from the outputs of its stages, in one atomic step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

from dyexport import __version__
from dyexport.bundle.golden import GOLDEN
from dyexport.bundle.manifest import (
    SCHEMA_VERSION,
    SHARED,
    EngineRecord,
    FileRecord,
    Manifest,
    Reference,
    budget_folder,
)
from dyexport.bundle.manifest_file import MANIFEST, RANGES, TOKENS, WIDTHS, manifest_text, read_manifest
from dyexport.bundle.plan import SegmentPlan
from dyexport.bundle.reader import Bundle, root_at
from dyexport.bundle.targets import ONNX, TARGETS
from dyexport.calibration.quantization import Ranges
from dyexport.compilation.additions import files_of_engine, files_of_engines
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
    engines, own = _engines(default, stored, None)
    files = {**stored, **own}
    dense = [engine for engine in engines if engine.network in SHARED]
    shared = {name: files[name] for engine in dense for name in files_of_engine(_records(files), engine)}
    for other in others:
        files |= _other_budget(other, stored, dense, shared)
    manifest = _manifest(default, None, engines, files)
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
    parts: BudgetParts, stored: Mapping[str, Source], dense: Sequence[EngineRecord], shared: Mapping[str, Source]
) -> dict[str, Source]:
    """Return the files of a budget that is not the default one, and its manifest, which it writes.

    ``stored`` is the weight store; ``dense`` are engines of the default budget, with the files ``shared``.
    """
    assert parts.run.settings.budget is not None
    folder = budget_folder(parts.run.settings.budget)
    engines, files = _engines(parts, stored, folder)
    manifest = _manifest(parts, folder, [*dense, *engines], {**stored, **shared, **files})
    path = parts.run.settings.work / parts.run.file(MANIFEST)
    write_atomically(path, manifest_text(manifest))
    return {**files, f"{folder}/{MANIFEST}": Source(path, describe(path)["."])}


def _manifest(
    parts: BudgetParts, folder: str | None, engines: Sequence[EngineRecord], files: Mapping[str, Source]
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
        engines=tuple(engines),
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


def _engines(
    parts: BudgetParts, stored: Mapping[str, Source], folder: str | None
) -> tuple[list[EngineRecord], dict[str, Source]]:
    """Return the engines of one budget, those too that ``dyexport compile`` has added, and the files of the budget.

    ``stored`` is the weight store; tables and golden data are in ``folder``.
    """
    out, files = parts.run.settings.out, _files(parts, folder)
    engines = [
        EngineRecord(target=ONNX, network=name, path=f"{GRAPHS}/{outcome.path.name}")
        for name, outcome in parts.graphs.items()
    ]
    graphs = {name: source.record for name, source in files.items() if name.startswith(f"{GRAPHS}/")}
    engines += [
        EngineRecord(target=target, network=name, path=f"{ENGINES}/{target}/{outcome.path.name}/{TARGETS[target].file}")
        for target, outcomes in parts.engines.items()
        for name, outcome in outcomes.items()
    ]
    for engine, records in compiled_engines(parts, graphs | _records(stored)):
        engines.append(engine)
        files |= {name: Source(out / name, record) for name, record in records.items()}
    return engines, files


def compiled_engines(
    parts: BudgetParts, graphs: Mapping[str, FileRecord]
) -> list[tuple[EngineRecord, dict[str, FileRecord]]]:
    """Return the engines of other targets that the bundle has for the same ``graphs`` of a budget, and their files.

    ``dyexport compile`` adds such engines to a bundle; a build that leaves its graphs as they are keeps them, unless
    their files are damaged.
    """
    settings = parts.run.settings
    old = _manifest_at(settings.out, settings.budget)
    if old is None or _graphs(old) != graphs:
        return []
    others = [engine for engine in old.own_engines if engine.target not in {ONNX, *parts.engines}]
    kept = [(engine, {name: old.files[name] for name in files_of_engines(old, [engine])}) for engine in others]
    damaged = {
        engine.target
        for engine, records in kept
        if any(any(damage(settings.out / name, {".": record})) for name, record in records.items())
    }
    return [(engine, records) for engine, records in kept if engine.target not in damaged]


def _manifest_at(out: Path, budget: float | None) -> Manifest | None:
    """Return the manifest of a budget of the bundle at ``out``, where there is one."""
    try:
        manifest = read_manifest(out / MANIFEST)
        if budget is None or budget == manifest.budget:
            return manifest
        return read_manifest(root_at(out, budget) / MANIFEST) if budget in manifest.budgets else None
    except BundleError:
        return None


def _graphs(manifest: Manifest) -> dict[str, FileRecord]:
    """Return the records of the weight store and of the graphs of a budget."""
    graphs = [engine.path for engine in manifest.own_engines if engine.target == ONNX]
    return {name: manifest.files[name] for name in (f"{GRAPHS}/{STORE}", *graphs)}


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
