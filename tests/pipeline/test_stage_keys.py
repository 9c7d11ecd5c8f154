"""Whatever a stage reads is part of what it was made from, by contents: a change of the same name and size is seen."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dyexport.checkpoints.static import save_static
from dyexport.checkpoints.weight_files import WEIGHTS
from dyexport.models.random_weights import random_backbone
from dyexport.pipeline.build import calibrate_model, opened
from dyexport.pipeline.settings import BuildSettings
from dyexport.stages.ledger import NullListener
from tests.pipeline.tiny import TINY, tiny_settings


def calibrated(settings: BuildSettings) -> set[str]:
    """Run what comes before the export; the stages that were done."""
    with opened(settings, NullListener()) as run:
        calibrate_model(run)
        return {name for name, outcome in run.ledger.outcomes.items() if not outcome.reused}


def write_shard(path: Path, seed: int) -> None:
    path.parent.mkdir(exist_ok=True)
    drawn = torch.randn(8, *TINY.latent_shape, generator=torch.Generator().manual_seed(seed))
    save_file({"latents": drawn, "labels": torch.arange(8)}, path)


def rewrite(path: Path, seed: int) -> None:
    """Other values of the same size, at the same time as far as the file tells."""
    before = path.stat()
    write_shard(path, seed)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def swap(one: Path, other: Path) -> None:
    one.rename(one.with_name("aside"))
    other.rename(one)
    one.with_name("aside").rename(other)


@pytest.mark.parametrize("change", ["rewritten", "swapped", "first is last"])
def test_data_is_known_by_its_contents(tmp_path: Path, change: str) -> None:
    shards = [tmp_path / "data" / f"{number}.safetensors" for number in range(3)]
    for seed, shard in enumerate(shards):
        write_shard(shard, seed)
    settings = tiny_settings(tmp_path, data=str(tmp_path / "data"), finetune_steps=0)
    calibrated(settings)
    assert calibrated(settings) == set()
    if change == "rewritten":
        rewrite(shards[1], seed=9)
    else:
        swap(shards[0], shards[1 if change == "swapped" else 2])
    assert calibrated(settings) == {"dynamic", "calibrate"}
    assert calibrated(settings) == set()


def with_norm_eps(value: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda config: {**config, "norm_eps": value}


@pytest.mark.parametrize("change", [with_norm_eps(1e-3), lambda config: {**config, "freq_shift": 0}, None])
def test_the_config_next_to_a_file_of_weights_is_part_of_it(
    tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]] | None
) -> None:
    """Another value of the same length, another entry, or no config any more."""
    save_static(random_backbone(TINY, 0), tmp_path)
    config = tmp_path / "config.json"
    content = {**json.loads(config.read_text()), "norm_eps": 1e-4}
    config.write_text(json.dumps(content))
    settings = tiny_settings(tmp_path, checkpoint=str(tmp_path / WEIGHTS), random_weights=False, finetune_steps=0)
    calibrated(settings)
    assert calibrated(settings) == set()
    if change is None:
        config.unlink()
    else:
        config.write_text(json.dumps(change(content)))
    assert "static" in calibrated(settings)
    assert calibrated(settings) == set()
