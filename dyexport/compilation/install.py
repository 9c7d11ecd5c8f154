"""Add compiled engines to a bundle, in steps that may be interrupted: every moment shows the old bundle or the new one.

New files get paths that nothing has, then the manifest is replaced in one step, then files that it no longer names are
deleted. A journal next to the bundle lists both, so that the next process can remove what a killed one left.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from pydantic import ValidationError

from dyexport.bundle.manifest import BundlePath, Manifest
from dyexport.bundle.manifest_file import MANIFEST, files_of, manifest_text
from dyexport.bundle.reader import Bundle, hub_blobs
from dyexport.bundle.records import Frozen
from dyexport.compilation.additions import Addition, default_manifest
from dyexport.compilation.jobs import ENGINES, engine_folder
from dyexport.digests import remember
from dyexport.errors import StorageError
from dyexport.files import (
    PARTIAL,
    check_writable,
    clear_partials,
    hard_linked,
    remove,
    replacing,
    storage_errors,
    write_atomically,
)
from dyexport.stages.file_records import describe
from dyexport.stages.ledger import LEDGER, Ledger, NullListener, Outcome

JOURNAL = "install.json"


class Journal(Frozen):
    """Changes that an installation makes: folders that it adds to a bundle, and files that it replaces."""

    added: tuple[BundlePath, ...] = ()
    replaced: tuple[BundlePath, ...] = ()


def work_folder(root: Path) -> Path:
    """Return the folder in which engines of a bundle are compiled: next to it, or in it if its parent is read-only."""
    if os.access(root.parent, os.W_OK | os.X_OK):
        return root.with_name(f".{root.name}.compile")
    return root / f"{PARTIAL}compile"


@contextmanager
def working_folder(root: Path) -> Iterator[Path]:
    """Yield the folder in which engines of a bundle are compiled; removed unless there is something to resume.

    Raises ``StorageError`` if it holds anything else.
    """
    folder = work_folder(root)
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name not in (ENGINES, LEDGER, JOURNAL) and not entry.name.startswith(PARTIAL):
            raise StorageError(f"{entry} was not written by dyexport; move it, then repeat")
    try:
        yield folder
    except BaseException:
        if not Ledger(folder, NullListener()).records:
            remove(folder)
        raise
    with storage_errors(folder):
        remove(folder)


def check_can_grow(root: Path) -> None:
    """Raise ``StorageError`` unless files can be added to a bundle: its own ones, on a file system for writing."""
    if hub_blobs(root) is not None or (root / MANIFEST).is_symlink():
        raise StorageError(
            f"{root} is in a cache, and its files are links; copy it with `cp -rL {root} DIR`, then compile DIR"
        )
    try:
        check_writable(root)
    except StorageError as error:
        why = error.__cause__.strerror if isinstance(error.__cause__, OSError) else str(error)
        raise StorageError(
            f"cannot add engines to {root}: {why}; copy it with `cp -r {root} DIR`, then compile DIR"
        ) from error


def install(target: str, engines: Sequence[tuple[Bundle, Mapping[str, Outcome]]]) -> Manifest:
    """Add engines to a bundle, instead of those of ``target`` of the same networks.

    ``engines`` are those of the bundle at each budget, the default one first, by network. Returns the manifest of the
    default budget. Raises ``StorageError`` if the disk is full.
    """
    root = engines[0][0].root
    folders = [engine_folder(name, bundle.label) for bundle, outcomes in engines for name in outcomes]
    place = _free_folder(root, f"{ENGINES}/{target}", folders)
    default, *others = (
        Addition(bundle=bundle, target=target, engines=outcomes, place=place) for bundle, outcomes in engines
    )
    manifests = {each.folder: each.manifest_at(each.folder, default) for each in others}
    new = default_manifest(default, others, manifests)
    added = [name for each in (default, *others) for name in each.places.values()]
    replaced = {name for each in (default, *others) for name in each.replaced}
    with storage_errors(root):
        planned = Journal(added=(*added, *manifests), replaced=tuple(sorted(replaced)))
        write_atomically(work_folder(root) / JOURNAL, planned.model_dump_json(indent=1).encode())
        for each in (default, *others):
            for name, folder in each.places.items():
                _place(each.engines[name], root / folder)
        for each in others:
            _place_manifest(each, manifests[each.folder])
        write_atomically(root / MANIFEST, manifest_text(new))
    finish_install(root)
    return new


def _place_manifest(addition: Addition, manifest: Manifest) -> None:
    """Write the new manifest of a budget that is not the default one, with its tables, into a new folder."""
    root, old = addition.bundle.base, addition.bundle.root
    with replacing(root / addition.folder) as partial:
        for name in addition.tables:
            copy = partial / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            if not hard_linked(old / name, copy):
                shutil.copyfile(old / name, copy)
        (partial / MANIFEST).write_bytes(manifest_text(manifest))


def finish_install(root: Path) -> None:
    """Remove files that an installation, which may have been killed, left or replaced and no manifest names."""
    with storage_errors(root):
        clear_partials(root / MANIFEST)
        journal = work_folder(root) / JOURNAL
        if (named := files_of(root)) is None:
            return
        changes = _read_journal(journal)
        for place in changes.added:
            clear_partials(root / place)
            if not any(name.startswith(f"{place}/") for name in named):
                _remove(root, place)
        for name in changes.replaced:
            if name not in named:
                _remove(root, name)
        journal.unlink(missing_ok=True)


def _read_journal(journal: Path) -> Journal:
    try:
        return Journal.model_validate_json(journal.read_bytes())
    except (OSError, ValidationError):
        return Journal()


def _free_folder(root: Path, wanted: str, engines: Iterable[str]) -> str:
    """Return a folder in which no engine has a folder yet: the one wanted, or one with a number."""
    names = (wanted if number == 1 else f"{wanted}-{number}" for number in count(1))
    return next(name for name in names if not any(os.path.lexists(root / name / engine) for engine in engines))


def _place(engine: Outcome, place: Path) -> None:
    """Put an engine's files into a new folder, as second names of the compiled ones if the disk allows."""
    with replacing(place) as partial:
        for name, record in engine.files.items():
            source, copy = engine.path / name, partial / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            if hard_linked(source, copy):
                remember(copy, record.sha256)
                continue
            shutil.copyfile(source, copy)
            if describe(copy)["."] != record:
                raise StorageError(f"{copy} was not written as it should be; check the disk, then repeat")


def _remove(root: Path, name: str) -> None:
    """Remove a file or folder of the bundle, and folders of engines that are then empty."""
    remove(root / name)
    folder = (root / name).parent
    while folder != root and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent
