"""The bundle: a directory that holds everything needed to run a model, and nothing else.

manifest.json                 ``dyexport.manifest``; hashes of every other file, and of its own text
graphs/segment-00.onnx ...    one graph per segment, weights by reference into the store
graphs/conditioning.onnx      what depends on t and the label alone; runs once for all steps
graphs/dense.onnx             the static model, for comparison (optional), with a conditioning of its own if need be
graphs/weights.bin            the weight store
calibration/widths.safetensors, calibration/tokens.safetensors
calibration/ranges.json       largest magnitudes of what quantized linear layers read
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from dyexport.digests import sha256_of
from dyexport.errors import BundleError, EngineMismatch
from dyexport.manifest import SCHEMA_VERSION, FileRecord, Manifest, first_problem
from dyexport.tables import TokenStats, WidthTable

MANIFEST = "manifest.json"
WIDTHS = "calibration/widths.safetensors"
TOKENS = "calibration/tokens.safetensors"
RANGES = "calibration/ranges.json"
SEALED = re.compile(rb'\{\n "sha256": "(?P<sha256>[0-9a-f]{64})",(?P<body>.*)', re.DOTALL)
LARGEST_MANIFEST = 2**26  # bytes; 64 engines of FLUX.1 take four million


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. Use ``Bundle.open``, which checks it."""

    root: Path
    manifest: Manifest

    @classmethod
    def open(cls, root: str | Path, *, check_hashes: bool = True) -> Bundle:
        """Read the manifest and check every file against it.

        Raises ``BundleError`` for a missing, truncated or altered file, a path outside the bundle,
        or a schema newer than this version of dyexport reads.
        """
        root = Path(root)
        bundle = cls(root, read_manifest(root / MANIFEST))
        for name, record in bundle.manifest.files.items():
            bundle._check(name, record, check_hashes)
        return bundle

    def _check(self, name: str, record: FileRecord, check_hashes: bool) -> None:
        path = self.root / name
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise BundleError(f"{path} points outside the bundle")
        if not path.is_file():
            raise BundleError(f"{path} is missing; build the bundle again")
        if path.stat().st_size != record.bytes:
            raise BundleError(
                f"{path} has {path.stat().st_size} bytes instead of {record.bytes}; build the bundle again"
            )
        if check_hashes and sha256_of(path) != record.sha256:
            raise BundleError(f"{path} does not match its hash; build the bundle again")

    def engine_paths(self, target: str) -> dict[str, Path]:
        """Engine files of one target, by network."""
        found = {e.network: self.root / e.path for e in self.manifest.engines if e.target == target}
        if not found:
            built = ", ".join(sorted({e.target for e in self.manifest.engines}))
            raise EngineMismatch(f"{self.root} has no {target!r} engines; it was built for {built}")
        return found

    @cached_property
    def widths(self) -> WidthTable:
        return WidthTable.load(self.root / WIDTHS)

    @cached_property
    def token_stats(self) -> TokenStats | None:
        path = self.root / TOKENS
        return TokenStats.load(path) if TOKENS in self.manifest.files else None


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
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise BundleError(f"{path}: {first_problem(error)}; build the bundle again") from error


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
