"""The data set of emoji, from packages in a folder, a registry and the cache."""

from __future__ import annotations

import base64
import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dyexport import emoji, emoji_packages
from dyexport.emoji import CLASSES, SHAPE, class_of, group_of, load_emoji, samples_emoji
from dyexport.emoji_packages import FOLDER_VARIABLE, INSTALL, PACKAGES, REGISTRY_VARIABLE, TWITTER
from dyexport.errors import DataError
from dyexport.presets import get_preset
from tests.emoji_packages import EACH, color_of, entries, make_packages


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_packages(tmp_path_factory.mktemp("node_modules"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("DYEXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.delenv(REGISTRY_VARIABLE, raising=False)
    yield tmp_path / "cache"
    emoji._stored.cache_clear()


def colors(pictures: np.ndarray) -> set[tuple[int, ...]]:
    """Return the colors at the bottom of pictures, as bytes."""
    return {tuple(pixel) for pixel in np.rint(pictures[..., -1, 0] * 255).astype(int)}


def test_pictures_are_on_white_scaled_and_labeled(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(packages))
    train = load_emoji("train")
    assert train.pictures.shape[1:] == SHAPE
    assert train.pictures.dtype == np.float32
    assert (train.pictures[:, :, :2] == 1).all(), "transparent pixels are not white"
    assert train.pictures[:, :, 2:].min() == 0
    assert set(train.labels) == set(range(len(CLASSES)))
    for label in range(len(CLASSES)):
        assert {color[0] for color in colors(train.pictures[train.labels == label])} == {28 * label}


def test_emoji_are_on_one_side_of_the_split(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(packages))
    train, held_out = (colors(load_emoji(split).pictures) for split in ("train", "held-out"))
    assert train.isdisjoint(held_out)
    assert train | held_out == {color_of(entry) for entry in entries()}
    assert len(held_out) == len(CLASSES)


def test_mirrored_pictures_fill_small_classes(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(packages))
    counts = np.bincount(load_emoji("train").labels)
    symbols, flags = CLASSES.index("symbols"), CLASSES.index("flags")
    assert counts[symbols] == 2 * (EACH - 1) * len(PACKAGES)
    assert counts[flags] == 2 * (EACH - 1) * (len(PACKAGES) - 1), "flags of one package repeat another's"
    monkeypatch.setattr(emoji, "QUOTA", {"train": 5, "held-out": 1})
    emoji._stored.cache_clear()
    monkeypatch.setenv("DYEXPORT_CACHE", str(packages.parent / "other"))
    assert set(np.bincount(load_emoji("train").labels)) == {5}


def test_the_cache_needs_no_packages(packages: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(packages))
    first = load_emoji("held-out")
    emoji._stored.cache_clear()
    monkeypatch.setenv(FOLDER_VARIABLE, str(cache))  # holds no package
    assert np.array_equal(load_emoji("held-out").pictures, first.pictures)
    emoji._stored.cache_clear()
    (cache / emoji.STORE).write_bytes(b"damaged")
    with pytest.raises(DataError, match="delete it"):
        load_emoji("train")


def test_a_folder_without_the_packages_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(DataError, match=f"does not hold {TWITTER.name}; run `{INSTALL}`"):
        load_emoji("train")


@pytest.fixture
def registry(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry of the small packages, by file URLs."""
    monkeypatch.setenv(REGISTRY_VARIABLE, f"{tmp_path.as_uri()}/registry/")
    for package in PACKAGES:
        file = Path(package.url().removeprefix("file://"))
        file.parent.mkdir(parents=True)
        with tarfile.open(file, "w:gz") as archive:
            archive.add(packages / package.name, "package")
    return tmp_path / "registry"


def test_packages_are_downloaded_with_a_notice(
    registry: Path, packages: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pinned(package: emoji_packages.Package) -> emoji_packages.Package:
        content = Path(package.url().removeprefix("file://")).read_bytes()
        return replace(package, integrity=base64.b64encode(hashlib.sha512(content).digest()).decode())

    monkeypatch.setattr(emoji_packages, "PACKAGES", tuple(map(pinned, PACKAGES)))
    downloaded = load_emoji("held-out")
    stderr = capsys.readouterr().err
    assert all(f"{package.label}: {package.megabytes} MB" in stderr for package in PACKAGES)
    assert all(package.license in stderr for package in PACKAGES)
    emoji._stored.cache_clear()
    monkeypatch.setenv("DYEXPORT_CACHE", str(registry / "cache"))
    monkeypatch.setenv(FOLDER_VARIABLE, str(packages))
    assert np.array_equal(load_emoji("held-out").pictures, downloaded.pictures)


def test_other_contents_are_refused(registry: Path) -> None:
    with pytest.raises(DataError, match=r"has SHA-512 .*, expected "):
        load_emoji("train")


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "no address"])
def test_without_a_network_the_cure_is_named(address: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv(REGISTRY_VARIABLE, address)
    with pytest.raises(DataError, match=f"cannot download {address}.*set {FOLDER_VARIABLE}"):
        load_emoji("train")
    assert not (cache / emoji.STORE).exists()


@pytest.mark.parametrize(
    ("variant", "other"),
    [
        ("1F468-200D-1F692", "1F9D1-200D-1F692"),  # firefighters
        ("1F46E", "1F46E-200D-2640-FE0F"),  # police officers
        ("1F44B", "1F44B-1F3FD"),  # hands
        ("1F468", "1F469"),
        ("1F6B6", "1F6B6-200D-2642-FE0F-200D-27A1-FE0F"),
    ],
)
def test_variants_share_a_group(variant: str, other: str) -> None:
    assert group_of(variant) == group_of(other)
    assert group_of(variant) != group_of("1F600")


@pytest.mark.parametrize(
    ("category", "subcategory", "name"),
    [
        ("People & Body", "person-role", "people"),
        ("People & Body", "hands", "hands"),
        ("People & Body", "body-parts", "hands"),
        ("Animals & Nature", "plant-flower", "food and plants"),
        ("Activities", "sport", "objects"),
        ("Component", "skin-tone", None),
    ],
)
def test_classes_follow_unicode(category: str, subcategory: str, name: str | None) -> None:
    assert class_of({"category": category, "subcategory": subcategory}) == name


def test_only_models_of_these_pictures_sample_emoji() -> None:
    assert samples_emoji(get_preset("sit-emoji"))
    assert not any(samples_emoji(get_preset(name)) for name in ("sit-digits", "dit-s-2"))


@pytest.mark.slow
def test_the_real_packages_fill_every_class() -> None:
    """Downloads 152 MB."""
    for split, count in emoji.QUOTA.items():
        loaded = load_emoji(split)  # type: ignore[arg-type]
        assert np.bincount(loaded.labels).tolist() == [count] * len(CLASSES)
        assert loaded.pictures.std() > 0.2  # of [0, 1]; an empty canvas has 0
