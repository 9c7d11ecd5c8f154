from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dyexport.errors import DataError, MissingDependencyError
from dyexport.presets import get_preset
from dyexport.training.config import TrainConfig
from dyexport.training.data import digits, open_source
from dyexport.training.randomness import step_generator
from dyexport.training.trainer import train_static
from tests.training.helpers import SIT, backbone

SHAPE = (4, 1, 8, 8)


def shard(directory: Path, name: str = "a.safetensors", **changes: torch.Tensor) -> Path:
    directory.mkdir(exist_ok=True)
    tensors = {"latents": torch.randn(SHAPE), "labels": torch.arange(4), **changes}
    save_file(tensors, directory / name)
    return directory / name


def test_digits_are_split_without_overlap_and_scaled() -> None:
    train, held_out = digits(), digits("held-out")
    assert (len(train), len(held_out)) == (1438, 359)
    assert train.latents.shape[1:] == (1, 8, 8)
    assert (float(train.latents.min()), float(train.latents.max())) == (-1.0, 1.0)
    assert set(held_out.labels.tolist()) == set(range(10))
    seen = {tuple(row) for row in train.latents.flatten(1).tolist()}
    assert not any(tuple(row) in seen for row in held_out.latents.flatten(1).tolist())


def test_digits_need_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingDependencyError, match=r"dyexport\[demo\]"):
        digits()


def test_digits_do_not_fit_an_imagenet_model() -> None:
    with pytest.raises(DataError, match=r"dit-s-2 takes \(4, 32, 32\); use --model dit-digits"):
        open_source("digits", get_preset("dit-s-2"))


def test_rows_come_from_the_right_shard(tmp_path: Path) -> None:
    first, second = torch.randn(SHAPE), torch.randn(SHAPE, dtype=torch.float64).half()
    shard(tmp_path, "a.safetensors", latents=first)
    shard(tmp_path, "b.safetensors", latents=second, labels=torch.tensor([5, 6, 7, 8], dtype=torch.int32))
    source = open_source(str(tmp_path), SIT)
    batch = source.batch(torch.tensor([7, 0, 4, 3]))
    assert len(source) == 8
    assert batch.conditions["class_labels"].tolist() == [8, 0, 5, 3]
    assert batch.latents.dtype == torch.float32
    assert torch.equal(batch.latents, torch.stack([second[3].float(), first[0], second[0].float(), first[3]]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"latents": torch.zeros(4, 1, 8, 4)},
            r"a\.safetensors: latents are \(4, 1, 8, 4\); tiny-sit takes \(4, 1, 8, 8\)",
        ),
        ({"labels": torch.arange(3)}, r"a\.safetensors: labels are \(3,\); tiny-sit takes \(4\)"),
        ({"labels": torch.zeros(4)}, r"a\.safetensors: labels are stored as F32; store them as I64"),
        ({"labels": torch.full((4,), torch.nan)}, r"a\.safetensors: labels are stored as F32"),
        ({"labels": torch.zeros(4, dtype=torch.bool)}, r"a\.safetensors: labels are stored as BOOL"),
        ({"labels": torch.zeros(4, dtype=torch.uint16)}, r"a\.safetensors: labels are stored as U16"),
        (
            {"labels": torch.zeros(4, 1, dtype=torch.int64)},
            r"a\.safetensors: labels are \(4, 1\); tiny-sit",
        ),
        ({"labels": torch.tensor(3)}, r"a\.safetensors: labels are \(\); tiny-sit takes \(4\)"),
        ({"latents": torch.tensor(3.0)}, r"a\.safetensors: latents are \(\); tiny-sit takes \(0, 1, 8, 8\)"),
        ({"latents": torch.zeros(0, 1, 8, 8)}, r"a\.safetensors: latents are \(0, 1, 8, 8\), which holds nothing"),
        (
            {"latents": torch.zeros(SHAPE, dtype=torch.int32)},
            r"a\.safetensors: latents are stored as I32",
        ),
        (
            {"latents": torch.zeros(SHAPE, dtype=torch.float8_e4m3fn)},
            r"a\.safetensors: latents are stored as F8_E4M3; store them as F32",
        ),
        ({"labels": torch.tensor([0, 1, 10, 3])}, r"a\.safetensors: labels hold 10, outside \[0, 10\)"),
    ],
)
def test_a_bad_shard_is_named(tmp_path: Path, changes: dict[str, torch.Tensor], message: str) -> None:
    shard(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        open_source(str(tmp_path), SIT)


def test_nan_names_its_file_and_row(tmp_path: Path) -> None:
    latents = torch.randn(SHAPE)
    latents[2, 0, 0, 0] = torch.nan
    shard(tmp_path, latents=latents)
    source = open_source(str(tmp_path), SIT)
    source.batch(torch.tensor([0, 1, 3]))
    with pytest.raises(DataError, match=r"a\.safetensors: latents\[2\] holds NaN"):
        source.batch(torch.tensor([2]))


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere is no directory; give a directory of latents"):
        open_source(str(tmp_path / "nowhere"), SIT)
    with pytest.raises(DataError, match=r"holds no \.safetensors files"):
        open_source(str(tmp_path), SIT)
    path = shard(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"cannot read .*a\.safetensors"):
        open_source(str(tmp_path), SIT)
    save_file({"images": torch.zeros(1)}, path)
    with pytest.raises(DataError, match=r"a\.safetensors.*'latents' and 'labels'"):
        open_source(str(tmp_path), SIT)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, 1e300])
def test_training_finds_what_is_not_finite_before_its_first_step(tmp_path: Path, value: float) -> None:
    latents = torch.randn(SHAPE, dtype=torch.float64)
    latents[2, 0, 0, 0] = value
    shard(tmp_path / "data", latents=latents)
    steps: list[int] = []
    config = TrainConfig(steps=1, batch_size=2, seed=first_seed_without(row=2))
    with pytest.raises(DataError, match=r"a\.safetensors: latents\[2\] holds NaN, infinity or a value beyond fp32"):
        train_static(
            backbone(SIT),
            SIT,
            open_source(str(tmp_path / "data"), SIT),
            config,
            work_dir=tmp_path,
            progress=lambda done, total, metrics: steps.append(done),
        )
    assert not steps


def first_seed_without(row: int) -> int:
    """A seed whose only step would not draw a row."""
    draws = (torch.randint(SHAPE[0], (2,), generator=step_generator(seed, 0, "data")) for seed in range(99))
    return next(seed for seed, drawn in enumerate(draws) if row not in drawn)


def test_a_damaged_header_is_an_error_of_the_data(tmp_path: Path) -> None:
    path = shard(tmp_path)
    whole, chance = path.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            content[chance.randrange(header)] = chance.randrange(256)
        path.write_bytes(content)
        try:
            open_source(str(tmp_path), SIT).check_finite()
        except DataError as error:
            refused += "a.safetensors" in str(error)
    assert refused > 100


def test_emoji_do_not_fit_a_model_of_digits() -> None:
    with pytest.raises(DataError, match=r"emoji are \(3, 32, 32\) in 9 classes.*use --model sit-emoji"):
        open_source("emoji", get_preset("sit-digits"))
