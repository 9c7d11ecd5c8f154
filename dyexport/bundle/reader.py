"""The bundle: a directory that holds everything needed to run a model, and nothing else.

manifest.json                 ``dyexport.bundle.manifest``; hashes of every other file, and of its text
graphs/segment-00.onnx ...    one graph per segment, weights by reference into the store
graphs/conditioning.onnx      what depends on t and the label alone; runs once for all steps
graphs/dense.onnx             the static model, for comparison (optional), with a conditioning of its own if need be
graphs/weights.bin            the weight store
calibration/widths.safetensors, calibration/tokens.safetensors
calibration/ranges.json       largest magnitudes of what quantized linear layers read
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError
from pydantic_core import from_json

from dyexport.bundle.manifest import SCHEMA_VERSION, FileRecord, Manifest, first_problem
from dyexport.bundle.tables import BoolArray, TokenStats, WidthTable
from dyexport.digests import sha256_of
from dyexport.errors import BundleError, EngineMismatchError

MANIFEST = "manifest.json"
WEIGHTS = "graphs/weights.bin"
WIDTHS = "calibration/widths.safetensors"
TOKENS = "calibration/tokens.safetensors"
RANGES = "calibration/ranges.json"
SEALED = re.compile(rb'\{\n "sha256": "(?P<sha256>[0-9a-f]{64})",(?P<body>.*)', re.DOTALL)
LARGEST_MANIFEST = 2**26  # bytes; 64 engines of FLUX.1 take four million


class Stamp(NamedTuple):
    """A file at one moment: another file in its place, or other bytes in it, has another stamp."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        found = path.stat()
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    @classmethod
    def find(cls, path: Path) -> Stamp | None:
        """None where there is no such file, or none that can be looked at."""
        try:
            return cls.of(path)
        except OSError:
            return None


@dataclass(frozen=True, repr=False)
class Bundle:
    """An opened bundle. Use ``Bundle.open``, which checks it. ``stamps`` are of its files at that moment."""

    root: Path
    manifest: Manifest
    stamps: dict[str, Stamp] = field(default_factory=dict)

    @classmethod
    def open(cls, root: str | Path, *, check_hashes: bool = True) -> Bundle:
        """Read the manifest and check every file against it, and the tables against the plan.

        Raises ``BundleError`` for a missing, truncated or altered file, a path outside the bundle,
        or a schema newer than this version of dyexport reads.
        """
        root = Path(os.path.realpath(root))
        before = Stamp.find(root / MANIFEST)
        bundle = cls(root, read_manifest(root / MANIFEST))
        for name, record in bundle.manifest.files.items():
            bundle._check(name, record, check_hashes)
        bundle._check_tables()
        if Stamp.find(root / MANIFEST) != before:
            raise BundleError(f"{root} changed while it was read; load it again")
        return bundle

    def __repr__(self) -> str:
        manifest = self.manifest
        targets = ", ".join(dict.fromkeys(engine.target for engine in manifest.engines))
        budget = "" if manifest.budget is None else f" at {manifest.budget:g} of the FLOPs"
        return (
            f"Bundle({str(self.root)!r}, {manifest.model.name}{budget}, K = {len(manifest.plan.segments)}, {targets})"
        )

    def _check(self, name: str, record: FileRecord, check_hashes: bool) -> None:
        path = self.root / name
        try:
            real = Path(os.path.realpath(path, strict=True))
            if not self._holds(real):
                raise BundleError(f"{path} points outside the bundle")
            stamp = self.stamps[name] = Stamp.of(real)
            if not real.is_file():
                raise BundleError(f"{path} is not a file; build the bundle again")
            if stamp.size != record.bytes:
                raise BundleError(f"{path} has {stamp.size} bytes instead of {record.bytes}; build the bundle again")
            if check_hashes and sha256_of(real) != record.sha256:
                raise BundleError(f"{path} does not match its hash; build the bundle again")
        except FileNotFoundError as error:
            raise BundleError(f"{path} is missing; build the bundle again") from error
        except OSError as error:
            raise BundleError(f"cannot read {path}: {error.strerror}; build the bundle again") from error

    def _holds(self, real: Path) -> bool:
        """Return whether a resolved file is in the bundle or among the files of its Hugging Face cache."""
        return real.is_relative_to(self.root) or real.parent == hub_blobs(self.root)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """For reading files after the bundle was opened. Raises ``BundleError`` where they are others by then."""
        self.check_unchanged(self.stamps)
        try:
            yield
        finally:
            self.check_unchanged(self.stamps)

    def check_unchanged(self, names: Iterable[str]) -> None:
        """Raises ``BundleError`` unless files are those that were there when the bundle was opened."""
        for name in names:
            if not self._is_same(name):
                raise BundleError(f"{self.root / name} has changed since the bundle was loaded; load it again")

    def _is_same(self, name: str) -> bool:
        """A file that got another name or owner, but no other bytes, is the same."""
        path, before = self.root / name, self.stamps[name]
        now = Stamp.find(path)
        if now is None or now == before:
            return now == before
        if now[:-1] != before[:-1] or _digest(path) != self.manifest.files[name].sha256:
            return False
        self.stamps[name] = now
        return True

    def _check_tables(self) -> None:
        """Hold the tables against the plan."""
        try:
            check_widths(self.widths, self.manifest)
            if (stats := self.token_stats) is not None:
                check_tokens(stats, self.manifest)
        except BundleError as error:
            raise BundleError(f"{self.root}: {error}; build the bundle again") from error

    def engine_paths(self, target: str) -> dict[str, Path]:
        """Engine files of one target, by network."""
        found = {e.network: self.root / e.path for e in self.manifest.engines if e.target == target}
        if not found:
            built = ", ".join(sorted({e.target for e in self.manifest.engines}))
            raise EngineMismatchError(f"{self.root} has no {target!r} engines; it was built for {built}")
        return found

    @cached_property
    def widths(self) -> WidthTable:
        return WidthTable.load(self.root / WIDTHS)

    @cached_property
    def token_stats(self) -> TokenStats | None:
        path = self.root / TOKENS
        return TokenStats.load(path) if TOKENS in self.manifest.files else None


def _digest(path: Path) -> str | None:
    """None where the file cannot be read."""
    try:
        return sha256_of(path)
    except OSError:
        return None


def manifest_text(manifest: Manifest) -> bytes:
    """A manifest as it is written, sealed."""
    return seal(manifest.model_dump_json(indent=1))


def seal(text: str) -> bytes:
    """A JSON object with a first member that is the hash of every byte after it.

    Bytes and not values are hashed: two texts may parse to the same values (keys that occur twice, ``1.0`` and
    ``1.00``), and a reader that must first parse cannot tell which of them was written.
    """
    body = text.encode().removeprefix(b"{")
    return b'{\n "sha256": "%s",%s' % (_sha256(body), body)


def hub_blobs(root: Path) -> Path | None:
    """Return the folder of files that ``models--ORG--NAME/snapshots/REVISION`` of the hub's cache links to."""
    for folder in (root, *root.parents):
        snapshots, repository = folder.parent, folder.parent.parent
        if snapshots.name == "snapshots" and repository.name.startswith("models--"):
            return repository / "blobs"
    return None


def read_manifest(path: Path) -> Manifest:
    """Parse a manifest; every way in which it can be wrong is a ``BundleError``."""
    try:
        raw = _read_whole(path)
        content = from_json(raw, allow_inf_nan=False)
    except FileNotFoundError as error:
        raise BundleError(f"{path.parent} is not a bundle: it has no {MANIFEST}") from error
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot read {path}: {error}; build the bundle again") from error
    _check_version(path, content)
    sealed = SEALED.fullmatch(raw)
    if sealed is None or sealed["sha256"] != _sha256(sealed["body"]):
        raise BundleError(f"{path} was changed after it was written: its hash differs; build the bundle again")
    del content["sha256"]
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        raise BundleError(f"{path}: {first_problem(error)}; build the bundle again") from error
    for name in required_files(manifest):
        if name not in manifest.files:
            raise BundleError(f"{path} names no {name}; build the bundle again")
    return manifest


def required_files(manifest: Manifest) -> list[str]:
    """Files that a bundle cannot run without, besides its engines."""
    files = [WEIGHTS, WIDTHS]
    if any(segment.slot_buckets for segment in manifest.plan.segments):
        files.append(TOKENS)
    return files if manifest.model.quantization is None else [*files, RANGES]


def check_widths(widths: WidthTable, manifest: Manifest) -> None:
    """Raises ``BundleError`` for a width table that is not of the plan's blocks and range of t."""
    if (widths.start, widths.end) != manifest.plan.span:
        raise BundleError(f"the width table covers {(widths.start, widths.end)}, the plan {manifest.plan.span}")
    for index, segment in enumerate(manifest.plan.segments):
        rows = widths.rows(segment.start, segment.end)
        _check_units(f"segment {index}", "head", widths.heads[rows], segment.heads)
        _check_units(f"segment {index}", "group", widths.groups[rows], segment.groups)


def _check_units(segment: str, kind: str, masks: BoolArray, kept: Sequence[Sequence[int]]) -> None:
    """Every unit that a segment lists is in the table, masks (R, L, U), and every unit that is on is listed."""
    _, depth, units = masks.shape
    if depth != len(kept):
        raise BundleError(f"the width table has {depth} blocks, {segment} has {len(kept)}")
    for block, listed in enumerate(kept):
        if max(listed) >= units:
            raise BundleError(f"{segment} has {kind} {max(listed)} in block {block}, the width table {units}")
        on = np.flatnonzero(masks[:, block].any(axis=0))
        if (missing := np.setdiff1d(on, listed)).size:
            raise BundleError(f"{segment} lacks {kind} {missing[0]} of block {block}, which the width table has on")


def check_tokens(stats: TokenStats, manifest: Manifest) -> None:
    """Raises ``BundleError`` for token counts of another model."""
    depth = manifest.plan.segments[0].depth
    if (stats.depth, stats.tokens) != (depth, manifest.model.tokens):
        raise BundleError(
            f"token counts are of {stats.depth} blocks and {stats.tokens} tokens, the plan is of {depth} and "
            f"{manifest.model.tokens}"
        )


def files_of(folder: Path) -> set[str] | None:
    """Names of a bundle's files, its manifest among them, whatever its schema; None where there is no bundle."""
    try:
        content = from_json(_read_whole(folder / MANIFEST))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        return None
    if type(content.get("schema_version")) is not int or not isinstance(content.get("dyexport_version"), str):
        return None
    return {MANIFEST, *content["files"]}


def _read_whole(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise ValueError("it is not a file")
    with path.open("rb") as file:
        raw = file.read(LARGEST_MANIFEST + 1)
    if len(raw) > LARGEST_MANIFEST:
        raise ValueError(f"it has more than {LARGEST_MANIFEST} bytes")
    return raw


def _check_version(path: Path, content: Any) -> None:
    version = content.get("schema_version") if isinstance(content, dict) else None
    if type(version) is not int:
        raise BundleError(f"{path} is not a dyexport manifest: it has no schema_version")
    if version > SCHEMA_VERSION:
        raise BundleError(f"{path} has schema {version}, this dyexport reads up to {SCHEMA_VERSION}; upgrade dyexport")
    if version < SCHEMA_VERSION:
        raise BundleError(f"{path} has schema {version}, of an older dyexport; build the bundle again")


def _sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()
