"""No weights are read where nothing is to be done: by a build that is up to date, by a second ``load``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dyexport.pipeline.settings import BuildSettings
from dyexport.runtime.loading import load
from tests.pipeline.tiny import TINY, build, redone

WIDE = replace(TINY, name="sit-wide", hidden_size=256)
STORE = "graphs/weights.bin"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> BuildSettings:
    """Of a model whose weights are most of its bytes."""
    root = tmp_path_factory.mktemp("wide")
    settings = BuildSettings(
        model=WIDE,
        budget=0.5,
        random_weights=True,
        engines=1,
        baseline=False,
        out=root / "bundle",
        work=root / "work",
    )
    build(settings)
    return settings


def bytes_read(action: Callable[[], object]) -> int:
    def so_far() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = so_far()
    action()
    return so_far() - before


def test_a_build_that_is_up_to_date_reads_no_weights(settings: BuildSettings) -> None:
    weights = (settings.out / STORE).stat().st_size
    assert redone(settings) == set()
    assert bytes_read(lambda: redone(settings)) < weights / 2


def test_the_build_after_the_first_one_reads_none_either(settings: BuildSettings, tmp_path: Path) -> None:
    other = replace(settings, out=tmp_path / "bundle", work=tmp_path / "work")
    build(other)
    assert bytes_read(lambda: redone(other)) < (other.out / STORE).stat().st_size / 2


def test_a_bundle_is_loaded_without_reading_its_weights(settings: BuildSettings) -> None:
    load(settings.out).close()
    assert bytes_read(lambda: load(settings.out).close()) < (settings.out / STORE).stat().st_size / 2


def test_weights_that_changed_are_read(settings: BuildSettings) -> None:
    store = settings.out / STORE
    content = store.read_bytes()
    store.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert redone(settings) == {"bundle"}
    assert store.read_bytes() == content
