"""The contract of a backbone, for every backbone: data, synthetic data and fine-tuning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dyexport.backbones import BACKBONES, get_conditioning
from dyexport.errors import DataError
from dyexport.models.random_weights import random_backbone, random_dynamic
from dyexport.training.config import FinetuneConfig
from dyexport.training.data import open_source
from dyexport.training.finetuning import finetune
from dyexport.training.synthetic import SyntheticConfig, generate
from dyexport.training.trainer import train_static
from tests.factories import tiny_preset

pytestmark = pytest.mark.parametrize("backbone", BACKBONES)
ROWS = 8


def columns(backbone: str) -> dict[str, Tensor]:
    """Random data: latents, and the columns that a backbone's conditions have."""
    preset = tiny_preset(backbone)
    columns = {"latents": torch.randn(ROWS, *preset.latent_shape)}
    for column in get_conditioning(preset).columns:
        shape = (ROWS, *(preset.text_tokens if size is None else size for size in column.shape))
        columns[column.name] = (
            torch.randn(shape) if column.classes is None else torch.randint(column.classes, shape, dtype=torch.int64)
        )
    return columns


def shards(directory: Path, tensors: dict[str, Tensor]) -> str:
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "a.safetensors")
    return str(directory)


def test_rows_of_shards_hold_latents_and_conditions(backbone: str, tmp_path: Path) -> None:
    preset, data = tiny_preset(backbone), columns(backbone)
    rows = torch.tensor([3, 0])
    latents, conditions = open_source(shards(tmp_path, data), preset).batch(rows)
    assert torch.equal(latents, data["latents"][rows])
    for column in get_conditioning(preset).columns:
        assert torch.equal(conditions[column.argument], data[column.name][rows])


def test_a_column_of_another_shape_is_named(backbone: str, tmp_path: Path) -> None:
    preset = tiny_preset(backbone)
    for name, tensor in columns(backbone).items():
        changed = {**columns(backbone), name: torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)}
        with pytest.raises(DataError, match=rf"a\.safetensors: {name} are \({ROWS}, "):
            open_source(shards(tmp_path / name, changed), preset)


def test_finetuning_on_synthetic_data_moves_lambda(backbone: str, tmp_path: Path) -> None:
    preset = tiny_preset(backbone)
    source = generate(random_backbone(preset), preset, SyntheticConfig(samples=8, steps=2), tmp_path / "data")
    model = random_dynamic(preset)
    for router in model.block_routers:
        router.open()
    start = {name: value.clone() for name, value in model.routers.named_parameters()}
    config = FinetuneConfig(steps=60, batch_size=4, budget=0.6, warmup=0.5)
    history = finetune(model, preset, source, config, work_dir=tmp_path).history
    assert history[0].flops_ratio > 0.95
    assert history[-1].flops_ratio < 0.9
    still = {name for name, value in model.routers.named_parameters() if torch.equal(value, start[name])}
    assert not still, "every router moves"


def test_the_static_model_trains(backbone: str, tmp_path: Path) -> None:
    preset = tiny_preset(backbone)
    source = open_source(shards(tmp_path / "data", columns(backbone)), preset)
    config = FinetuneConfig(steps=15, batch_size=8, learning_rate=1e-3, ema_decay=0.0)
    history = train_static(random_backbone(preset), preset, source, config, work_dir=tmp_path).history
    assert history[-1].diffusion < history[0].diffusion
