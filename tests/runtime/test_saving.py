"""A bundle is saved and opened again as diffusers' models are, from directories and from the hub."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from dyexport.backbones.dit.stand_in import DiTBundle
from dyexport.backbones.flux.stand_in import FluxBundle
from dyexport.errors import BundleError, StorageError, UsageError
from dyexport.runtime.loading import load
from tests.runtime.bundles import TinyBundle, predict, write_bundle


def test_a_saved_bundle_is_a_bundle_with_a_card(ddpm: TinyBundle, tmp_path: Path) -> None:
    transformer = load(ddpm.root)
    transformer.save_pretrained(tmp_path / "saved", safe_serialization=True, max_shard_size="1GB")
    for again in (load(tmp_path / "saved"), DiTBundle.from_pretrained(tmp_path / "saved")):
        assert torch.equal(predict(again), predict(transformer))
    card = ModelCard.load(tmp_path / "saved" / "README.md")
    assert card.data.library_name == "dyexport"
    assert {"diffusers", "onnx"} <= set(card.data.tags)
    assert "dyexport.load" in card.text
    assert "dyexport verify" in card.text
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["_class_name"] == "DiTBundle"
    assert dict(DiTBundle.load_config(tmp_path / "saved"))["sample_size"] == transformer.config.sample_size


def test_saving_again_replaces_the_bundle(ddpm: TinyBundle, flow: TinyBundle, tmp_path: Path) -> None:
    load(flow.root).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "graphs" / "left-over.onnx").touch()
    transformer = load(ddpm.root)
    transformer.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(predict(again), predict(transformer))
    assert not (tmp_path / "saved" / "graphs" / "left-over.onnx").exists()
    again.save_pretrained(tmp_path / "saved")
    assert torch.equal(predict(load(tmp_path / "saved")), predict(transformer))


def test_saving_spares_what_is_not_a_bundle(ddpm: TinyBundle, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(StorageError, match="not empty and not a bundle"):
        load(ddpm.root).save_pretrained(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_bundle_that_was_built_again_is_not_saved(own: Path, tmp_path: Path) -> None:
    write_bundle(own)
    transformer = load(own)
    other = write_bundle(tmp_path / "other", segments=1)
    for file in sorted(other.root.rglob("*")):
        if file.is_file():
            (own / file.relative_to(other.root)).write_bytes(file.read_bytes())
    with pytest.raises(BundleError, match="changed"):
        transformer.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("options", "named"), [({"push_to_hub": True}, "push_to_hub"), ({"half_of_it": True}, "half_of_it")]
)
def test_options_that_would_do_nothing_are_refused(
    ddpm: TinyBundle, tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        load(ddpm.root).save_pretrained(tmp_path / "saved", **options)


def test_from_pretrained_takes_what_pipelines_and_load_take(ddpm: TinyBundle, tmp_path: Path) -> None:
    load(ddpm.root).save_pretrained(tmp_path / "pipeline" / "transformer")
    transformer = DiTBundle.from_pretrained(
        tmp_path / "pipeline",
        subfolder="transformer",
        torch_dtype=torch.bfloat16,
        device_map={"": "cpu"},
        low_cpu_mem_usage=True,
        use_safetensors=None,
        max_resident=2,
        dense=True,
    )
    assert (transformer.dtype, transformer.engine.max_resident) == (torch.bfloat16, 2)
    assert torch.equal(predict(transformer), predict(load(ddpm.root, dense=True)))


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"quantization_config": None}, UsageError, "quantization_config"),
        ({"device_map": {"first": "cpu", "second": "cuda"}}, UsageError, "device_map"),
        ({"device_map": "auto"}, UsageError, "'auto'"),
        ({"torch_dtype": torch.int8}, UsageError, "dtype"),
    ],
)
def test_what_from_pretrained_cannot_do(
    ddpm: TinyBundle, arguments: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        DiTBundle.from_pretrained(ddpm.root, **arguments)


def test_a_bundle_of_another_backbone_is_refused(ddpm: TinyBundle) -> None:
    with pytest.raises(BundleError, match="a bundle of dit"):
        FluxBundle.from_pretrained(ddpm.root)


@pytest.fixture
def hub(ddpm: TinyBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub in which ``someone/tiny`` is a bundle; files are links, as the hub's client lays them out."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--tiny"
    for number, file in enumerate(sorted(path for path in ddpm.root.rglob("*") if path.is_file())):
        blob = repository / "blobs" / f"{number:064x}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(file.read_bytes())
        entry = repository / "snapshots" / commit / file.relative_to(ddpm.root)
        entry.parent.mkdir(parents=True, exist_ok=True)
        entry.symlink_to(os.path.relpath(blob, entry.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_id_is_a_bundle(hub: Path, ddpm: TinyBundle) -> None:
    wanted = predict(load(ddpm.root))
    assert torch.equal(predict(load("someone/tiny")), wanted)
    assert torch.equal(predict(DiTBundle.from_pretrained("someone/tiny", revision="main", cache_dir=hub)), wanted)


def test_a_saved_hub_bundle_has_its_files(hub: Path, ddpm: TinyBundle, tmp_path: Path) -> None:
    load("someone/tiny").save_pretrained(tmp_path / "saved")
    assert not any(path.is_symlink() for path in (tmp_path / "saved").rglob("*"))
    assert torch.equal(predict(load(tmp_path / "saved")), predict(load(ddpm.root)))


@pytest.mark.parametrize("source", ["someone/nothing", "some--one/..", "no/such/directory", "nothing"])
def test_what_is_neither_directory_nor_repository_is_named(source: str) -> None:
    with pytest.raises(BundleError, match=source):
        load(source)
