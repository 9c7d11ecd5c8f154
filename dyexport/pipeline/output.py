"""The folder that a build writes: its default name, ownership of its files, and atomic replacement."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dyexport.bundle.manifest import DENSE, FileRecord, Manifest
from dyexport.bundle.manifest_file import MANIFEST, WORK, files_of, read_manifest
from dyexport.bundle.spec import Widths
from dyexport.digests import sha256_of
from dyexport.errors import BundleError, StorageError, UsageError
from dyexport.files import PARTIAL, flush, hard_linked, put, remove, replacing, sync
from dyexport.stages.locking import renamable

STAGING = f"{PARTIAL}bundle"  # inside a folder that cannot be renamed


def default_out(model: str, budgets: Sequence[float | None], widths: Widths | None = None) -> Path:
    """Return the default directory of a bundle."""
    shares = [f"{budget:g}" for budget in budgets if budget is not None]
    parts = [model, *shares, *(["static"] if widths == "static" else [])]
    return Path("-".join(parts))


def default_work(out: Path) -> Path:
    """Return the default work directory of a bundle, next to it. Raises ``UsageError`` for the root directory."""
    path = Path(os.path.abspath(out))
    if not path.name:
        raise UsageError(f"-o is {out}; give the name of a directory for the bundle")
    return path.with_name(f"{path.name}{WORK}")


def check_ours(out: Path) -> None:
    """Raise ``UsageError`` unless ``out`` is a bundle, an empty folder, missing, or left over by a stopped build."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out} is a file; -o takes a directory")
    if files_of(out) is None and not (out / STAGING).is_dir() and any(_foreign(out)):
        raise UsageError(f"{out} is not empty and not a bundle; choose another -o")


def replaced_settings(out: Path, new: Manifest) -> dict[str, Any]:
    """Return what the bundle at ``out`` was built with, where that differs from ``new``; {} where there is none.

    ``weights`` is the hash of its calibrated model, which any setting of training and calibration changes.
    """
    try:
        old = _settings_of(read_manifest(out / MANIFEST))
    except BundleError:
        return {}
    return {name: value for name, value in old.items() if value != _settings_of(new)[name]}


def replaced_notice(out: Path, replaced: Mapping[str, Any]) -> str:
    """Return a sentence that names what the bundle at ``out`` had before it was ``replaced``."""
    parts = [f"{name} {_shown(value)}" for name, value in replaced.items() if name != "weights"]
    parts += ["other weights or routers"] if "weights" in replaced else []
    return f"replaced the bundle in {out}, which had {', '.join(parts)}; to keep both, give each its own output"


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _settings_of(manifest: Manifest) -> dict[str, Any]:
    spec, networks = manifest.model, {engine.network for engine in manifest.engines}
    return {
        "model": spec.name,
        "budget": manifest.budget,
        "budgets": list(manifest.budgets),
        "widths": manifest.widths,
        "weights": None if manifest.reference is None else manifest.reference.sha256,
        "precision": spec.precision,
        "quantization": spec.quantization,
        "engines": len(manifest.plan.segments),
        "targets": sorted({engine.target for engine in manifest.engines}),
        "token paths": sorted({path for segment in manifest.plan.segments for path in segment.token_paths}),
        "dense graph": DENSE in networks,
    }


@contextmanager
def staged(out: Path, records: Mapping[str, FileRecord]) -> Iterator[Path]:
    """Yield a folder to write a bundle of files ``records`` into, which then replaces ``out``.

    The replacement is one step, so that there is a whole bundle at every moment; the disk holds both for a while. Files
    that dyexport did not write stay. A folder that cannot be renamed, because a file system is mounted there, or that
    is the current directory of this process, is replaced entry by entry: for milliseconds it holds parts of both.
    """
    place = Path(os.path.realpath(out))
    own = (files_of(place) or set()) | (files_of(place / STAGING) or set())
    _check_conflicts(place, own, records)
    if not place.is_dir() or (renamable(place) and not Path.cwd().is_relative_to(place)):
        with replacing(place) as staging:
            staging.mkdir()
            yield staging
            _keep(place, staging, own)
        return
    staging = place / STAGING
    remove(staging)
    try:
        staging.mkdir()
        yield staging
        _keep(place, staging, own)
        sync(staging)
    except BaseException:
        remove(staging)
        raise
    _change_contents(place, staging)
    remove(staging)


def _check_conflicts(out: Path, own: Collection[str], records: Mapping[str, FileRecord]) -> None:
    """Raise ``StorageError`` if a file that dyexport did not write has a name that the bundle needs."""
    for name in _foreign(out, own):
        path = out / name
        same = name in records and path.is_file() and sha256_of(path) == records[name].sha256
        if not same and any(_excludes(path, name, new) for new in (MANIFEST, *records)):
            raise StorageError(
                f"{path} was not written by dyexport, and the bundle needs a file of that name; move it, then repeat"
            )


def _excludes(path: Path, name: str, new: str) -> bool:
    """Return whether ``path``, called ``name`` in its folder, excludes a file ``new``."""
    folder = path.is_dir() and not path.is_symlink()
    return name == new or name.startswith(f"{new}/") or (new.startswith(f"{name}/") and not folder)


def _foreign(folder: Path, own: Collection[str] = (), below: str = "") -> Iterator[str]:
    """Yield names of files, links and empty folders in ``folder`` that are not ``own``."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name) if folder.is_dir() else ():
        name = below + entry.name
        if name in own or (not below and name.startswith(PARTIAL)):
            continue
        if not entry.is_dir(follow_symlinks=False):
            yield name
        elif any(Path(entry).iterdir()):
            yield from _foreign(Path(entry), own, f"{name}/")
        else:
            yield name


def _keep(out: Path, staging: Path, own: Collection[str]) -> None:
    """Link files that dyexport did not write into the folder that will be ``out``."""
    for name in _foreign(out, own):
        old, new = out / name, staging / name
        if os.path.lexists(new):
            continue
        new.parent.mkdir(parents=True, exist_ok=True)
        if old.is_dir() and not old.is_symlink():
            new.mkdir()
        elif not hard_linked(old, new):
            shutil.copy2(old, new, follow_symlinks=False)
    if out.is_dir():
        shutil.copymode(out, staging)


def _change_contents(out: Path, staging: Path) -> None:
    """Replace the entries of ``out`` by those of ``staging``, the manifest last."""
    new = {entry.name for entry in staging.iterdir()}
    for name in new - {MANIFEST}:
        put(staging / name, out / name)
    for entry in out.iterdir():
        if entry.name not in new and not entry.name.startswith(PARTIAL):
            remove(entry)
    put(staging / MANIFEST, out / MANIFEST)
    flush(out)
