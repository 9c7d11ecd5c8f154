"""Putting the bundle together. The manifest comes last, so a bundle that is not complete is not a bundle."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from dyexport import __version__
from dyexport.build.ledger import Outcome, describe
from dyexport.build.settings import BuildSettings
from dyexport.bundle import MANIFEST, Bundle, manifest_text, read_manifest
from dyexport.errors import BundleError, StorageError
from dyexport.files import PARTIAL, remove, storage_errors, sync, write_atomically
from dyexport.manifest import SCHEMA_VERSION, EngineRecord, FileRecord, Manifest, ModelSpec, Reference, SegmentPlan

STAGING = f"{PARTIAL}bundle"


class Source(NamedTuple):
    """Where a file of the bundle is taken from, and what it must be; ``moved`` where the disk shall hold it once."""

    path: Path
    record: FileRecord
    moved: bool = False

    @classmethod
    def of(cls, outcome: Outcome, name: str = ".", *, moved: bool = False) -> Source:
        return cls(outcome.path / name, outcome.files[name], moved)


def describe_bundle(
    settings: BuildSettings,
    spec: ModelSpec,
    plan: SegmentPlan,
    files: Mapping[str, Source],
    engines: Mapping[tuple[str, str], str],
    reference: Outcome,
    metrics: Mapping[str, float],
) -> Manifest:
    """The manifest of ``files``, which are named by their place in the bundle."""
    return Manifest(
        schema_version=SCHEMA_VERSION,
        dyexport_version=__version__,
        model=spec,
        budget=settings.budget,
        plan=plan,
        engines=tuple(EngineRecord(target=t, network=name, path=path) for (t, name), path in engines.items()),
        reference=Reference(path=os.path.relpath(reference.path, settings.out), sha256=reference.digest),
        metrics=dict(metrics),
        files={name: source.record for name, source in sorted(files.items())},
    )


def assemble(out: Path, manifest: Manifest, files: Mapping[str, Source]) -> bool:
    """Make ``out`` this bundle; returns whether it was so already.

    A kill at any moment leaves the bundle of before, none, or this one. Files that neither the new
    bundle nor the one before it names stay where they are. A file that is moved leaves a link to where it went.
    """
    current, staging = _is_current(out, manifest), out / STAGING
    with storage_errors(out):
        created = not out.exists()
        try:
            if not current:
                _stage(out, staging, files)
                _publish(out, staging, manifest, files)
        finally:
            remove(staging)
            if created and not any(out.iterdir()):
                out.rmdir()
    return current


def _is_current(out: Path, manifest: Manifest) -> bool:
    try:
        return Bundle.open(out).manifest == manifest
    except BundleError:
        return False


def _stage(out: Path, staging: Path, files: Mapping[str, Source]) -> None:
    """Copy, or give a second name to what is moved."""
    remove(staging)
    for name, source in files.items():
        place = staging / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.moved and _linked(source.path, place, out / name):
            continue
        shutil.copyfile(source.path, place)
        if describe(place)["."] != source.record:
            raise StorageError(f"{place} was not written as it should be; check the disk, then repeat")
    sync(staging)


def _linked(path: Path, place: Path, final: Path) -> bool:
    """Give a file its name in staging, unless another bundle has it or it is on another disk."""
    if path.is_symlink() and path.resolve() != final.resolve():
        return False
    try:
        os.link(path.resolve(), place)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        return False
    return True


def _publish(out: Path, staging: Path, manifest: Manifest, files: Mapping[str, Source]) -> None:
    """From the moment the old manifest is gone until the new one is there, ``out`` is not a bundle."""
    before = _files_of(out)
    (out / MANIFEST).unlink(missing_ok=True)
    for name in before - manifest.files.keys():
        (out / name).unlink(missing_ok=True)
    for name, source in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (staging / name).replace(out / name)
        (staging / name).unlink(missing_ok=True)  # a name of the same file replaces nothing and stays
        _leave_link(source.path, out / name)
    sync(out)
    write_atomically(out / MANIFEST, manifest_text(manifest))


def _leave_link(path: Path, final: Path) -> None:
    """A moved file keeps one name: ONNX's checker refuses external data that has two."""
    if path.is_symlink() or not path.samefile(final):
        return
    link = path.with_name(PARTIAL + path.name)
    remove(link)
    link.symlink_to(os.path.relpath(final.resolve(), path.parent.resolve()))
    link.replace(path)


def _files_of(out: Path) -> set[str]:
    try:
        return set(read_manifest(out / MANIFEST).files)
    except BundleError:
        return set()
