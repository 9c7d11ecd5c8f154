"""Pictures of several aspect ratios: their sizes, their latents, and training on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from dyexport.backbones import get_conditioning
from dyexport.encoding.buckets import Size, bucket_sizes, nearest
from dyexport.encoding.encode import Encoding
from dyexport.encoding.settings import EncodeSettings
from dyexport.errors import UsageError
from dyexport.models.random_weights import random_dynamic
from dyexport.pipeline.calibration_inputs import calibration_inputs
from dyexport.presets import get_preset
from dyexport.training.config import FinetuneConfig
from dyexport.training.data import ShardDirectory, open_source
from dyexport.training.finetuning import DynamicTrainer
from dyexport.training.randomness import Share
from tests.encoding.folders import class_folder, encode, picture
from tests.encoding.test_encode import MODEL, pixels_of
from tests.pipeline.tiny import shallow, tiny_settings
from tests.pipeline.tiny_pipeline import save_pipeline, small_vae

FLUX = get_preset("flux-tiny")


@pytest.mark.parametrize(("side", "step"), [(1024, 64), (512, 32), (128, 16)])
def test_sizes_have_about_the_same_area(side: int, step: int) -> None:
    sizes = bucket_sizes(side, 16)
    assert Size(side, side) in sizes
    assert {Size(width, height) for height, width in sizes} == set(sizes)
    for height, width in sizes:
        assert height % step == width % step == 0
        assert 0.75 * side**2 < height * width <= side**2
        assert 0.5 <= height / width <= 2


def test_a_picture_gets_the_nearest_ratio() -> None:
    sizes = bucket_sizes(1024, 16)
    assert nearest(Size(3000, 3001), sizes) == (1024, 1024)
    assert nearest(Size(900, 1600), sizes) == (768, 1344)
    assert nearest(Size(10, 1), sizes) == sizes[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide, tall and square pictures with captions."""
    root = tmp_path_factory.mktemp("pictures")
    for number, (width, height) in enumerate([(60, 40), (40, 60), (50, 50), (61, 40), (50, 51)]):
        picture(root / f"{number}.png", seed=number, width=width, height=height).with_suffix(".txt").write_text("a fox")
    return root


@pytest.fixture(scope="module")
def latents(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those pictures in buckets, with their pipeline next to them."""
    root = tmp_path_factory.mktemp("encoded")
    pipeline = save_pipeline(root / "flux")
    encode(EncodeSettings.complete(folder, model=FLUX.name, pipeline=str(pipeline), buckets=True), root / "latents")
    return root / "latents"


@pytest.fixture(scope="module")
def source(latents: Path) -> ShardDirectory:
    source = open_source(str(latents), FLUX)
    assert isinstance(source, ShardDirectory)
    return source


def test_each_shard_holds_one_size(folder: Path, latents: Path, source: ShardDirectory) -> None:
    assert [shard.grid for shard in source.shards] == [(10, 6), None, (6, 10)]  # of 160 x 96, 128 x 128 and 96 x 160
    assert [len(shard) for shard in source.shards] == [1, 2, 2]
    pipe = FluxPipeline.from_pretrained(latents.parent / "flux", text_encoder=None, text_encoder_2=None)
    with torch.no_grad():
        encoded = pipe.vae.encode(pixels_of([folder / "1.png"], 160, 96)).latent_dist.mode()
    packed = pipe._pack_latents((encoded - 0.1) * 0.3, *encoded.shape)  # (1, 60, 16)
    batch = source.batch(torch.tensor([0]))
    torch.testing.assert_close(batch.latents, packed, atol=1e-5, rtol=1e-5)
    inputs = get_conditioning(FLUX).inputs(batch.latents, torch.tensor([0.5]), batch.conditions)
    expected = pipe._prepare_latent_image_ids(1, 10, 6, torch.device("cpu"), torch.float32)
    assert torch.equal(inputs["img_ids"], expected)


def test_the_positions_of_tokens_follow_the_grid() -> None:
    preset = get_preset("qwen-image-tiny")
    conditioning = get_conditioning(preset)
    conditions = conditioning.random(2, torch.Generator())
    latents = torch.randn(2, 54, 16)
    own = conditioning.inputs(latents, torch.ones(2), conditions)
    other = conditioning.inputs(latents, torch.ones(2), {**conditions, "grid": torch.tensor([[9, 6]] * 2)})
    assert own["img_shapes"].tolist() == [1, 8, 8]
    assert other["img_shapes"].tolist() == [1, 9, 6]
    assert own.keys() == other.keys()


def test_a_batch_has_one_size_and_every_size_comes_up(source: ShardDirectory) -> None:
    seen: dict[int, set[int]] = {}
    for seed in range(60):
        rows = source.random_rows(4, torch.Generator().manual_seed(seed))
        tokens = source.batch(rows).latents.shape[1]
        seen.setdefault(int(rows.min() > 0) + int(rows.min() > 2), set()).update(rows.tolist())
        assert tokens == (64 if 0 < int(rows[0]) < 3 else 60)
    assert seen == {0: {0}, 1: {1, 2}, 2: {3, 4}}


def test_calibration_takes_pictures_of_the_size_of_the_model(source: ShardDirectory, tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, model=FLUX.name)
    clean = calibration_inputs(settings, source).clean
    assert clean is not None
    assert len(clean) == 2
    assert torch.equal(clean.batch(torch.arange(2)).latents, source.batch(torch.tensor([1, 2])).latents)


def test_training_takes_batches_of_all_sizes(latents: Path, tmp_path: Path) -> None:
    preset = shallow(FLUX.name)
    config = FinetuneConfig(steps=8, batch_size=2, complete=0.5, warmup=0.5, micro_batch=1)
    source = open_source(str(latents), preset)
    trainer = DynamicTrainer(random_dynamic(preset, seed=0), preset, source, config, work_dir=tmp_path)
    positions = []
    for _ in range(config.steps):
        positions.append(tuple(trainer.batch(Share()).inputs["img_ids"].amax(dim=0).tolist()))
        trainer.advance()
    assert set(positions) == {(0, 9, 5), (0, 7, 7), (0, 5, 9)}
    assert all(point.diffusion > 0 for point in trainer.history)
    assert len(trainer.history) == config.steps


def test_pictures_of_another_size_than_the_models_own(folder: Path, latents: Path, tmp_path: Path) -> None:
    pipeline = str(latents.parent / "flux")
    encode(EncodeSettings.complete(folder, model=FLUX.name, pipeline=pipeline, size=64), tmp_path / "latents")
    source = open_source(str(tmp_path / "latents"), FLUX)
    assert source.batch(torch.arange(5)).latents.shape == (5, 16, 16)
    assert calibration_inputs(tiny_settings(tmp_path, model=FLUX.name), source).clean is None


def test_a_model_of_one_size_has_no_buckets(tmp_path: Path) -> None:
    small_vae().save_pretrained(tmp_path / "vae")
    folder = class_folder(tmp_path / "pictures", count=1)
    settings = EncodeSettings(folder=folder, vae=str(tmp_path / "vae"), preset=MODEL, buckets=True)
    for changed, name in ((settings, "dit-encoded"), (replace(settings, preset=None), "a model of classes")):
        with pytest.raises(UsageError, match=f"--buckets is for models that take several sizes, and {name} takes one"):
            Encoding(changed)
