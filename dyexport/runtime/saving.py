"""Save a bundle in the layout of a diffusers model: its files, a configuration and a model card."""

from __future__ import annotations

import shutil
from pathlib import Path

from dyexport.backbones import get_pipeline
from dyexport.bundle.golden import GOLDEN
from dyexport.bundle.manifest import Manifest
from dyexport.bundle.manifest_file import MANIFEST, files_of, manifest_text
from dyexport.bundle.reader import Bundle
from dyexport.errors import StorageError
from dyexport.files import replacing, storage_errors

CONFIG = "config.json"  # by which diffusers and the hub recognize a model
CARD = "README.md"


def save_bundle(bundle: Bundle, directory: Path, config: str) -> None:
    """Copy a bundle to a directory, with all its budgets; an earlier bundle there is replaced atomically.

    Raises ``StorageError`` for a directory that holds anything else, and ``BundleError`` for a bundle that has changed
    since it was opened.
    """
    bundle = bundle.whole()
    if directory.resolve() == bundle.root:
        return
    with storage_errors(directory):
        if directory.is_dir() and any(directory.iterdir()) and files_of(directory) is None:
            raise StorageError(f"{directory} is not empty and not a bundle; save to another directory")
    with replacing(directory) as partial:
        with bundle.unchanged():
            for name in bundle.manifest.files:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(bundle.root / name, partial / name)
        (partial / MANIFEST).write_bytes(manifest_text(bundle.manifest))
        (partial / CONFIG).write_text(config, encoding="utf-8")
        (partial / CARD).write_text(model_card(bundle.manifest), encoding="utf-8")


def model_card(manifest: Manifest) -> str:
    """Write the model card: the model, how it was built, its cost, and how to load and verify it."""
    from huggingface_hub import ModelCardData

    spec, plan = manifest.model, manifest.plan
    targets = sorted({engine.target for engine in manifest.engines})
    tags = ["dyexport", "diffusers", spec.backbone, *targets]
    data = ModelCardData(
        library_name="dyexport", pipeline_tag=get_pipeline(spec.backbone).task, tags=tags, base_model=spec.hub_id
    )
    budget = "that of the checkpoint" if manifest.budget is None else f"{manifest.budget:g}"
    if manifest.budgets:
        budget += f" (default) of {', '.join(f'{each:g}' for each in manifest.budgets)}"
    paths = sorted({path for segment in plan.segments for path in segment.token_paths})
    note = (
        " It needs nothing else: the bundle has inputs and the outputs of the reference for them."
        if GOLDEN in manifest.files
        else ""
    )
    engines = (
        "one slim\nengine, which serves all sampling steps."
        if manifest.widths == "static"
        else f"{len(plan.segments)} slim\nengines, each for a part of the sampling steps."
    )
    return f"""---
{data.to_yaml()}
---

# {spec.name}

A bundle of dyexport: a diffusion transformer cut into {engines}

| | |
|---|---|
| backbone | {spec.backbone} |
| budget: share of the dense model's attention and MLP FLOPs | {budget} |
| the same as run over a trajectory (lambda) | {plan.flops_ratio:.3f} |
| share of the whole network's FLOPs, as run | {plan.network_flops_ratio:.3f} |
| widths | {manifest.widths} |
| token paths | {", ".join(paths)} |
| precision | {spec.number_formats} |
| targets | {", ".join(targets)} |
| size | {sum(record.bytes for record in manifest.files.values()) / 1e6:.1f} MB |
| made by | dyexport {manifest.dyexport_version} |

```python
import dyexport

transformer = dyexport.load("DIRECTORY OR HUB ID")  # stands in for pipe.transformer
```

This compares the engines with the reference, the diffusers module with its gates multiplied in.{note}

    dyexport verify DIRECTORY
"""
