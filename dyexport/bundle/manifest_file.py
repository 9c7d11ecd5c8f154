"""Read and write ``manifest.json``, sealed with its hash."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from dyexport.bundle.manifest import SCHEMA_VERSION, Manifest
from dyexport.bundle.records import REPLACE, first_problem
from dyexport.errors import BundleError

MANIFEST = "manifest.json"
WEIGHTS = "graphs/weights.bin"
WIDTHS = "calibration/widths.safetensors"
TOKENS = "calibration/tokens.safetensors"
RANGES = "calibration/ranges.json"
WORK = ".work"  # added to a bundle's name, the default name of the work directory of its build
PIPELINE_PART = "transformer"  # folder of a saved pipeline that can be a bundle
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # of a repository of the Hugging Face hub
SEALED = re.compile(rb'\{\n "sha256": "(?P<sha256>[0-9a-f]{64})",(?P<body>.*)', re.DOTALL)
LARGEST_MANIFEST = 2**26  # bytes; 64 engines of a 12-billion-parameter model take four million


def manifest_text(manifest: Manifest) -> bytes:
    """Return the text of a manifest, with its own hash."""
    return seal(manifest.model_dump_json(indent=1))


def seal(text: str) -> bytes:
    """Add a first member to a JSON object: the hash of every byte after it.

    Bytes are hashed instead of values because different texts can parse to the same values: duplicate keys, or
    ``1.0`` and ``1.00``.
    """
    body = text.encode().removeprefix(b"{")
    return b'{\n "sha256": "%s",%s' % (_sha256(body), body)


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest. Raises ``BundleError`` for anything wrong with it."""
    check_folder(path.parent)
    try:
        raw = _read_whole(path)
        content = from_json(raw, allow_inf_nan=False)
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot read {path}: {error}; {REPLACE}") from error
    _check_version(path, content)
    sealed = SEALED.fullmatch(raw)
    if sealed is None or sealed["sha256"] != _sha256(sealed["body"]):
        raise BundleError(f"{path} was changed after it was written: its hash differs; {REPLACE}")
    del content["sha256"]
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        raise BundleError(f"{path}: {first_problem(error)}; build the bundle again") from error
    for name in required_files(manifest):
        if name not in manifest.files:
            raise BundleError(f"{path} names no {name}; build the bundle again")
    return manifest


def check_folder(root: Path) -> None:
    """Raise ``BundleError`` for a path without a manifest. The message names the bundle that was meant, if any."""
    try:
        if os.path.lexists(root / MANIFEST):
            return
        mode = root.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleError(f"{root} does not exist; give the directory of a bundle{_download(root)}") from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise BundleError(f"cannot read {root}: {why}; give the directory of a bundle") from error
    if not stat.S_ISDIR(mode):
        there = root.parent if root.name == MANIFEST else "the directory of a bundle"
        raise BundleError(f"{root} is a file; give {there}")
    if os.path.isfile((inside := root / PIPELINE_PART) / MANIFEST):
        raise BundleError(f"{root} is a saved pipeline, whose transformer is a bundle; give {inside}")
    built = root.parent / root.name.removesuffix(WORK)
    if root.name.endswith(WORK) and os.path.isfile(built / MANIFEST):
        raise BundleError(f"{root} is the work directory of a build, whose bundle is next to it; give {built}")
    raise BundleError(f"{root} is not a bundle: it has no {MANIFEST}; give a directory that `dyexport build` wrote")


def _download(root: Path) -> str:
    """Return how to get a bundle from the hub, for a path that may be the id of a repository."""
    name = str(root)
    return f"; if it is on the hub: hf download {name} --local-dir {root.name}" if HUB_ID.fullmatch(name) else ""


def required_files(manifest: Manifest) -> list[str]:
    """Return the files that a bundle needs, in addition to its engines."""
    files = [WEIGHTS, manifest.place(WIDTHS)]
    if any(segment.slot_buckets for segment in manifest.plan.segments):
        files.append(manifest.place(TOKENS))
    return files if manifest.model.quantization is None else [*files, manifest.place(RANGES)]


def files_of(folder: Path) -> set[str] | None:
    """Return the names of a bundle's files, including its manifest, for any schema; None without a bundle."""
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
