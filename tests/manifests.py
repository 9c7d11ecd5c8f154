"""Changes bundles as a forger would: with every hash, so that what is checked after the hashes is tested."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx

from dyexport.bundle.graph_labels import labels_for
from dyexport.bundle.manifest import FileRecord
from dyexport.bundle.manifest_file import MANIFEST, manifest_text, read_manifest, seal
from dyexport.digests import sha256_of

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


def label(graph: Path, labels: Mapping[str, str]) -> None:
    """Have a graph say of itself what it is."""
    model = onnx.load(graph, load_external_data=False)
    onnx.helper.set_model_props(model, dict(labels))
    graph.write_bytes(model.SerializeToString())


def relabel(root: Path) -> None:
    """Have every graph of a bundle agree with what a forged manifest says of it."""
    manifest = read_manifest(root / MANIFEST)
    files = dict(manifest.files)
    for engine in manifest.engines:
        if engine.target == "onnx":
            path = root / engine.path
            label(path, labels_for(engine.network, manifest.model, manifest.plan))
            files[engine.path] = FileRecord(sha256=sha256_of(path), bytes=path.stat().st_size)
    (root / MANIFEST).write_bytes(manifest_text(manifest.model_copy(update={"files": files})))
