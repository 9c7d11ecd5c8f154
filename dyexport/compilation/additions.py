"""Manifests of a bundle that engines are added to: one, or one for each of its budgets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import PurePosixPath
from typing import Any

from dyexport.bundle.manifest import SHARED, EngineRecord, FileRecord, Manifest, budget_folder
from dyexport.bundle.manifest_file import MANIFEST, manifest_text
from dyexport.bundle.reader import Bundle
from dyexport.bundle.targets import TARGETS
from dyexport.compilation.jobs import ENGINES, engine_folder
from dyexport.stages.file_records import record_of
from dyexport.stages.ledger import Outcome


@dataclass(frozen=True, kw_only=True)
class Addition:
    """New ``engines`` by network of a bundle at one budget, which get folders in the new folder ``place``.

    They replace those of ``target`` of the same networks.
    """

    bundle: Bundle
    target: str
    engines: Mapping[str, Outcome]
    place: str

    @property
    def places(self) -> dict[str, str]:
        """The folders of the engines, by network."""
        return {name: f"{self.place}/{engine_folder(name, self.bundle.label)}" for name in self.engines}

    @property
    def kept(self) -> list[EngineRecord]:
        own = self.bundle.manifest.own_engines
        return [engine for engine in own if engine.target != self.target or engine.network not in self.engines]

    @property
    def added(self) -> list[EngineRecord]:
        file = TARGETS[self.target].file
        return [
            EngineRecord(target=self.target, network=name, path=f"{folder}/{file}")
            for name, folder in self.places.items()
        ]

    @property
    def records(self) -> dict[str, FileRecord]:
        """The files of the new engines."""
        return {
            f"{folder}/{part}": record
            for name, folder in self.places.items()
            for part, record in self.engines[name].files.items()
        }

    @property
    def replaced(self) -> set[str]:
        """Files that the new manifests do not name: of replaced engines, and the budget's folder, which has moved."""
        manifest = self.bundle.manifest
        files = files_of_engines(manifest, [engine for engine in manifest.own_engines if engine not in self.kept])
        if manifest.folder is None:
            return files
        return files | {f"{manifest.folder}/{name}" for name in (*self.tables, MANIFEST)}

    @property
    def tables(self) -> list[str]:
        """Names in the budget's folder of all but its manifest."""
        prefix = f"{self.bundle.manifest.folder}/"
        return [name.removeprefix(prefix) for name in self.bundle.manifest.files if name.startswith(prefix)]

    @cached_property
    def folder(self) -> str:
        """A new folder for a budget that is not the default one."""
        budget = self.bundle.manifest.budget
        assert budget is not None
        folders = (budget_folder(budget, version) for version in count(1))
        return next(folder for folder in folders if not (self.bundle.base / folder).exists())

    def manifest_at(self, folder: str, default: Addition) -> Manifest:
        """Return the new manifest of a budget that is not the default one, whose files move to ``folder``."""
        old = self.bundle.manifest
        shared = [engine for engine in (*default.kept, *default.added) if engine.network in SHARED]
        common = [engine for engine in old.engines if engine.network in SHARED]
        stale = files_of_engines(old, common) | self.replaced
        files = {name: record for name, record in old.files.items() if name not in stale}
        files |= {f"{folder}/{name}": old.files[f"{old.folder}/{name}"] for name in self.tables}
        known = {**default.bundle.manifest.files, **default.records}
        files |= {name: known[name] for engine in shared for name in files_of_engine(known, engine)}
        return changed(old, [*self.kept, *self.added, *shared], files | self.records, folder=folder)


def default_manifest(default: Addition, others: Sequence[Addition], manifests: Mapping[str, Manifest]) -> Manifest:
    """Return the new manifest of the default budget, which names all files; ``manifests`` of the others by folder."""
    old = default.bundle.manifest
    replaced = {name for each in (default, *others) for name in each.replaced}
    files = {name: record for name, record in old.files.items() if name not in replaced} | default.records
    for folder, manifest in manifests.items():
        files |= manifest.files | {f"{folder}/{MANIFEST}": record_of(manifest_text(manifest))}
    return changed(old, [*default.kept, *default.added], files)


def changed(manifest: Manifest, engines: list[EngineRecord], files: Mapping[str, FileRecord], **other: Any) -> Manifest:
    """Return a manifest with other engines, checked."""
    values = {"engines": tuple(engines), "files": dict(sorted(files.items())), **other}
    return Manifest.model_validate(manifest.model_copy(update=values).model_dump())


def files_of_engines(manifest: Manifest, engines: list[EngineRecord]) -> set[str]:
    """Return the files of engines: each engine file, and in a folder of engines its description."""
    return {name for engine in engines for name in files_of_engine(manifest.files, engine)}


def files_of_engine(files: Mapping[str, FileRecord], engine: EngineRecord) -> Iterator[str]:
    """Yield the files of an engine, among those of a bundle."""
    path = PurePosixPath(engine.path)
    yield str(path)
    if path.parts[0] == ENGINES and len(path.parts) > 3:
        yield from (name for name in files if PurePosixPath(name).parent == path.parent)
