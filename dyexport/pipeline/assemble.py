"""Putting the bundle together, whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from dyexport import __version__
from dyexport.bundle.manifest import (
    SCHEMA_VERSION,
    EngineRecord,
    FileRecord,
    Manifest,
    ModelSpec,
    Reference,
    SegmentPlan,
)
from dyexport.bundle.reader import MANIFEST, Bundle, manifest_text
from dyexport.digests import remember
from dyexport.errors import BundleError, StorageError
from dyexport.files import hard_linked, remove, replacing, storage_errors
from dyexport.pipeline.ledger import Outcome, describe
from dyexport.pipeline.output import STAGING, staged
from dyexport.pipeline.settings import BuildSettings


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

    A kill at any moment leaves the old bundle or the new one. Files that neither the new bundle nor the one before
    it names stay where they are. A file that is moved leaves a link to where it went.
    """
    current = _is_current(out, manifest)
    with storage_errors(out):
        if current:
            remove(out / STAGING)  # of a build that was killed when all was done
        else:
            with staged(out, manifest.files) as staging:
                _fill(staging, out, files)
                (staging / MANIFEST).write_bytes(manifest_text(manifest))
        moved = {name: source for name, source in files.items() if source.moved}
        for name, source in moved.items():
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
    """Copy, or give a second name to what is moved."""
    for name, source in files.items():
        place = staging / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.moved and _linked(source.path, place, out / name):
            continue
        shutil.copyfile(source.path, place)
        if describe(place)["."] != source.record:
            raise StorageError(f"{place} was not written as it should be; check the disk, then repeat")


def _linked(path: Path, place: Path, final: Path) -> bool:
    """Give a file its name in staging, unless another bundle has it or it is on another disk."""
    if path.is_symlink() and path.resolve() != final.resolve():
        return False
    return hard_linked(path.resolve(), place)


def _leave_link(path: Path, final: Path) -> None:
    """A moved file keeps one name: ONNX's checker refuses external data that has two."""
    if path.is_symlink() or not path.samefile(final):
        return
    with replacing(path, follow_symlinks=False) as link:
        link.symlink_to(os.path.relpath(final.resolve(), path.parent.resolve()))
