"""Changes a bundle's manifest as a forger would: with its hash, so that what is checked after the hash is tested."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dyexport.bundle import MANIFEST, seal

Content = dict[str, Any]


def forge(root: Path, change: Callable[[Content], Any]) -> None:
    """Change what a manifest says and seal it again."""
    content = json.loads((root / MANIFEST).read_bytes())
    change(content)
    write_content(root, content)


def write_content(root: Path, content: Content) -> None:
    """Write a manifest of any content, sealed."""
    content = {key: value for key, value in content.items() if key != "sha256"}
    (root / MANIFEST).write_bytes(seal(json.dumps(content)))
