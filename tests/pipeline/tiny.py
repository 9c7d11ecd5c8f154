"""The smallest model that has everything: two blocks, eight heads, 16 tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dyexport.backbones.base import Preset
from dyexport.bundle.reader import Bundle
from dyexport.pipeline.build import build_bundle, opened
from dyexport.pipeline.settings import BuildSettings
from dyexport.presets import get_preset
from dyexport.stages.ledger import NullListener
from tests.manifests import forge

TINY = get_preset("sit-tiny")
BLOCKS: dict[str, dict[str, Any]] = {
    "flux-tiny": {"double_blocks": 1, "single_blocks": 2},
    "latte-tiny": {"pairs": 1},
    "qwen-image-tiny": {"layers": 2},
}


def tiny_settings(root: Path, **values: Any) -> BuildSettings:
    """Random weights at half the FLOPs, in one engine and without baseline unless ``values`` say otherwise."""
    given = {"model": TINY.name, "budget": 0.5, "random_weights": True, "engines": 1, "baseline": False, **values}
    return BuildSettings(out=root / "bundle", work=root / "work", **given)


def shallow(model: str) -> Preset:
    """Return a preset with few blocks: one of each kind, and a last one, which passes on no text."""
    return replace(get_preset(model), name=f"{model}-shallow", **BLOCKS[model])


def build(settings: BuildSettings) -> Bundle:
    with opened(settings, NullListener()) as run:
        build_bundle(run)
    return Bundle.open(settings.out)


def redone(settings: BuildSettings) -> set[str]:
    """Build, and return the stages that were not reused."""
    with opened(settings, NullListener()) as run:
        build_bundle(run)
        return {name for name, outcome in run.ledger.outcomes.items() if not outcome.reused}


def hashes(directory: Path) -> dict[str, str]:
    """Every file of a directory by its hash."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def tamper(root: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Change a file of a bundle, and its hash in the manifest as a forger would."""
    content = change((root / name).read_bytes())
    (root / name).write_bytes(content)
    record = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    forge(root, lambda manifest: manifest["files"].update({name: record}))
