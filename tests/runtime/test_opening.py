"""Engines are activated long after ``load``: what they read then is the bundle that was loaded, or an error."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dyexport.backbones.dit.stand_in import DiTBundle
from dyexport.bundle.manifest_file import MANIFEST, WEIGHTS, WIDTHS
from dyexport.errors import BundleError, UsageError
from dyexport.runtime.loading import BundleTransformer, load
from tests.pipeline.tiny import build, tamper, tiny_settings
from tests.runtime.bundles import TinyBundle, make_inputs, write_bundle
from tests.runtime.conftest import Saved

FIRST, LAST = 990.0, 10.0  # t of the segments that sampling starts and ends with


def predict(transformer: BundleTransformer, t: float) -> torch.Tensor:
    sample: torch.Tensor = transformer(**make_inputs(2, t=t)).sample
    return sample


def halve(content: bytes) -> bytes:
    return (np.frombuffer(content, np.float32) / 2).tobytes()


def build_again(root: Path) -> None:
    """Another bundle of the same sizes takes this one's place, as a build does it: old files go, new ones come."""
    other = root.with_name("other")
    shutil.copytree(root, other)
    tamper(other, WEIGHTS, halve)
    root.rename(root.with_name("old"))
    other.rename(root)
    shutil.rmtree(root.with_name("old"))


def replace_store(root: Path) -> None:
    halved = root / "graphs/new"
    halved.write_bytes(halve((root / WEIGHTS).read_bytes()))
    halved.replace(root / WEIGHTS)


def overwrite_store(root: Path) -> None:
    """The same file with other bytes: memory that is mapped from it shows them."""
    halved = halve((root / WEIGHTS).read_bytes())
    with (root / WEIGHTS).open("r+b") as file:
        file.write(halved)


def swap_graphs(root: Path) -> None:
    first, last = root / "graphs/segment-00.onnx", root / "graphs/segment-02.onnx"
    shutil.copy(last, root / "new")
    first.replace(last)
    (root / "new").replace(first)


@pytest.mark.parametrize("share_weights", [False, True])
@pytest.mark.parametrize("change", [build_again, replace_store, overwrite_store, swap_graphs])
def test_a_bundle_that_changes_after_load_draws_nothing(
    own: Path, change: Callable[[Path], None], share_weights: bool
) -> None:
    write_bundle(own)
    transformer = load(own, max_resident=1, share_weights=share_weights)
    before = predict(transformer, FIRST)
    change(own)
    for _ in range(2):
        with pytest.raises(BundleError, match="has changed since the bundle was loaded; load it again"):
            predict(transformer, LAST)
    if change is build_again:
        assert not torch.equal(predict(load(own), FIRST), before)


def test_memory_that_is_mapped_shows_what_is_written_to_its_file(own: Path) -> None:
    """An engine that is active already, and needs nothing more of its files."""
    write_bundle(own, segments=1)
    transformer = load(own, share_weights=True)
    predict(transformer, FIRST)
    overwrite_store(own)
    with pytest.raises(BundleError, match="load it again"):
        predict(transformer, FIRST)


def test_a_bundle_that_is_gone_is_named(own: Path) -> None:
    write_bundle(own)
    transformer = load(own)
    shutil.rmtree(own)
    with pytest.raises(BundleError, match=f"{own}.* has changed"):
        predict(transformer, FIRST)
    with pytest.raises(BundleError, match="has changed"):
        transformer.residency  # noqa: B018


def test_a_second_name_changes_no_file(own: Path, tmp_path: Path) -> None:
    """Deploying links a bundle's files, and backups copy them: the loaded bundle goes on."""
    write_bundle(own)
    transformer = load(own, max_resident=1)
    before = [predict(transformer, t) for t in (FIRST, LAST)]
    for number, name in enumerate((WEIGHTS, WIDTHS, "graphs/segment-00.onnx")):
        os.link(own / name, tmp_path / str(number))
        (own / name).chmod(0o600)
    assert all(map(torch.equal, [predict(transformer, t) for t in (FIRST, LAST)], before))


def test_a_link_to_a_bundle_is_followed_once(own: Path, tmp_path: Path) -> None:
    """Whoever switches a link to the next bundle changes nothing for those who have loaded the one before."""
    write_bundle(own)
    (tmp_path / "current").symlink_to(own)
    transformer = load(tmp_path / "current", max_resident=1)
    before = predict(transformer, FIRST)
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to(tmp_path)
    predict(transformer, LAST)
    assert torch.equal(predict(transformer, FIRST), before)


def test_a_relative_path_is_that_of_the_moment_of_load(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bundle(own)
    monkeypatch.chdir(own.parent)
    transformer = load(own.name)
    monkeypatch.chdir("/")
    assert torch.equal(predict(transformer, FIRST), predict(load(own), FIRST))


def assert_no_flip_is_overlooked(root: Path, flips: int) -> None:
    """Single bits of a manifest, drawn at random: not one is read as another model, or is an error of another kind."""
    content, random = (root / MANIFEST).read_bytes(), np.random.default_rng(0)
    for bit in random.integers(8 * len(content), size=flips).tolist():
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (root / MANIFEST).write_bytes(flipped)
        with pytest.raises(BundleError, match="manifest"):
            load(root, check_hashes=False)
    (root / MANIFEST).write_bytes(content)
    load(root)


def test_no_flipped_bit_of_a_built_bundle_is_overlooked(dit: Saved, own: Path) -> None:
    assert_no_flip_is_overlooked(Path(shutil.copytree(dit.bundle, own)), 200)


@pytest.mark.slow
def test_no_flipped_bit_of_the_digits_bundle_is_overlooked(tmp_path: Path) -> None:
    assert_no_flip_is_overlooked(build(tiny_settings(tmp_path, model="sit-digits", engines=16)).root, 2000)


def test_a_loop_of_links_is_no_bundle(own: Path) -> None:
    own.symlink_to(own)
    with pytest.raises(BundleError, match="bundle"):
        load(own)


@pytest.mark.parametrize("path", ["", None, 3, b"bundle", "\0", "a\0b", ["bundle"], True], ids=repr)
def test_what_is_no_path_is_refused_in_one_sentence(
    ddpm: TinyBundle, path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ddpm.root)  # no empty path means the current directory
    with pytest.raises(UsageError, match=r"^bundle path is .*; give the directory of a bundle") as error:
        load(path)
    assert repr(path) in str(error.value)


def test_a_path_that_no_file_system_takes_is_no_bundle() -> None:
    with pytest.raises(BundleError, match=r"^cannot read /.*: File name too long; give the directory of a bundle$"):
        load("n" * 5000)


def test_a_manifest_is_said_to_be_a_file_of_its_bundle(ddpm: TinyBundle) -> None:
    with pytest.raises(BundleError, match=rf"^{ddpm.root}/manifest.json is a file; give {ddpm.root}$"):
        load(ddpm.root / MANIFEST)
    with pytest.raises(BundleError, match=r"weights\.bin is a file; give the directory of a bundle$"):
        load(ddpm.root / WEIGHTS)


def test_a_saved_pipeline_is_said_to_hold_a_bundle(tmp_path: Path) -> None:
    write_bundle(tmp_path / "transformer")
    with pytest.raises(BundleError, match=rf"is a saved pipeline, .*; give {tmp_path}/transformer$"):
        load(tmp_path)
    assert predict(load(str(tmp_path / "transformer")), FIRST).isfinite().all()
    opened = DiTBundle.from_pretrained(tmp_path, subfolder="transformer")
    assert predict(opened, FIRST).isfinite().all()


HASH = "{:064x}"


def in_hub_cache(bundle: Path, cache: Path, folder: str = "") -> Path:
    """A bundle as the hub's client leaves it: every file is a link from a snapshot to a blob with another name."""
    repository = cache / "models--someone--something"
    snapshot = repository / "snapshots" / "0123abc" / folder
    (repository / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in bundle.rglob("*") if path.is_file())):
        link = snapshot / file.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = repository / "blobs" / HASH.format(number)
        shutil.copy(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.mark.parametrize("share_weights", [False, True])
@pytest.mark.parametrize("folder", ["", "bundles/half"])
def test_a_bundle_in_the_hubs_cache_runs(own: Path, tmp_path: Path, folder: str, share_weights: bool) -> None:
    bundle = write_bundle(own)
    cached = in_hub_cache(own, tmp_path / "hub", folder)
    assert (cached / MANIFEST).is_symlink()
    transformer = load(cached, share_weights=share_weights)
    for t in (FIRST, LAST):
        inputs = make_inputs(2, t=t)
        torch.testing.assert_close(transformer(**inputs).sample, bundle(**inputs).sample, atol=1e-4, rtol=0)


@pytest.mark.parametrize("place", ["models--someone--else/blobs", "models--someone--something/refs", "blobs", ".."])
def test_no_other_link_leaves_a_snapshot(own: Path, tmp_path: Path, place: str) -> None:
    write_bundle(own)
    cached = in_hub_cache(own, tmp_path / "hub")
    outside = tmp_path / "hub" / place / "file"
    outside.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(cached / WEIGHTS, outside)
    (cached / WEIGHTS).unlink()
    (cached / WEIGHTS).symlink_to(outside)
    with pytest.raises(BundleError, match="points outside the bundle"):
        load(cached)


def test_blobs_of_a_bundle_elsewhere_are_outside(own: Path, tmp_path: Path) -> None:
    """A folder called blobs next to a bundle is no cache."""
    write_bundle(own)
    (tmp_path / "blobs").mkdir()
    (own / WEIGHTS).rename(tmp_path / "blobs/weights")
    (own / WEIGHTS).symlink_to("../../blobs/weights")
    with pytest.raises(BundleError, match="points outside the bundle"):
        load(own)
