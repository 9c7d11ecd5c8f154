from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dyexport.errors import DataError, MissingDependency
from dyexport.presets import get_preset
from dyexport.training.data import digits, open_source
from tests.training.helpers import SIT

SHAPE = (4, 1, 8, 8)


def shard(directory: Path, name: str = "a.safetensors", **changes: torch.Tensor) -> Path:
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
    with pytest.raises(MissingDependency, match=r"dyexport\[demo\]"):
        digits()


def test_digits_do_not_fit_an_imagenet_model() -> None:
    with pytest.raises(DataError, match=r"dit-s-2 takes \(4, 32, 32\); use dit-digits"):
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
        ({"labels": torch.zeros(4)}, r"a\.safetensors: labels are torch\.float32"),
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
    with pytest.raises(DataError, match=r"holds no \.safetensors files"):
        open_source(str(tmp_path / "nowhere"), SIT)
    path = shard(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"cannot read .*a\.safetensors"):
        open_source(str(tmp_path), SIT)
    save_file({"images": torch.zeros(1)}, path)
    with pytest.raises(DataError, match=r"a\.safetensors.*'latents' and 'labels'"):
        open_source(str(tmp_path), SIT)
