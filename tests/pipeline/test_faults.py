"""At every write a disk may be full, and a process interrupted or killed: the old bundle loads until the new one is."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from dyexport.bundle.manifest import Manifest
from dyexport.bundle.reader import Bundle
from dyexport.files import PARTIAL, remove
from dyexport.pipeline.assemble import assemble
from dyexport.pipeline.build import build_bundle, opened
from dyexport.stages.locking import locked_output
from tests.bundle.test_reader import GRAPH, root
from tests.pipeline.faults import Fault, Writes, each_write
from tests.pipeline.test_assemble import moving, parts
from tests.pipeline.tiny import build, hashes, tiny_settings

__all__ = ["root"]  # a fixture
ENDS = {"full": "StorageError", "interrupt": "KeyboardInterrupt", "kill": "killed"}


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(PARTIAL)]


@pytest.mark.build
@pytest.mark.parametrize(("fault", "inside"), [("full", False), ("interrupt", False), ("kill", False), ("kill", True)])
def test_a_bundle_is_put_together_whatever_write_fails(root: Path, tmp_path: Path, fault: Fault, inside: bool) -> None:
    """Each time from the same start, and once more without a fault. One that we are ``inside`` is not exchanged."""
    place, start = tmp_path / "place", tmp_path / "start"
    out, work = place / "out", place / "work"
    assemble(start / "out", *parts(root))
    (start / "out" / "graphs" / "mine.txt").write_text("mine")
    (root / GRAPH).write_bytes(b"a new graph")
    shutil.copytree(root, start / "work")

    def reset() -> None:
        remove(place)
        shutil.copytree(start, place, symlinks=True)

    def put_together(writes: Writes) -> None:
        if inside:
            os.chdir(out)
        with locked_output(out):
            assemble(out, *moving(work))

    reset()
    old = Bundle.open(out).manifest
    assemble(out, *moving(work))
    new, undisturbed = Bundle.open(out).manifest, hashes(place)
    assert len(undisturbed) > len(new.files)
    seen = []
    for change, end in each_write(place, fault, put_together, reset):
        assert end == "done" or end.startswith(ENDS[fault]), (change, end)
        assert (out / "graphs" / "mine.txt").read_text() == "mine"
        if not inside:
            assert Bundle.open(out).manifest in (old, new), change
        with locked_output(out):
            assemble(out, *moving(work))
        assert hashes(place) == undisturbed, change
        assert not leftovers(place), change
        seen.append(change)
    for part in ("open", "write", "link", "symlink", "fsync", "mkdir", "rename" if inside else "dlsym"):
        assert any(part in change for change in seen), part


class Start(NamedTuple):
    """A bundle of before, with a file of its user's, and the bundle that an undisturbed build makes of it."""

    folder: Path
    old: Manifest
    new: Manifest
    undisturbed: dict[str, str]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    folder = tmp_path_factory.mktemp("start")
    old = build(tiny_settings(folder / "old", seed=1)).manifest
    (folder / "old" / "bundle" / "mine.txt").write_text("mine")
    remove(folder / "old" / "work")
    shutil.copytree(folder / "old", folder / "new")
    new = build(tiny_settings(folder / "new")).manifest
    return Start(folder / "old", old, new, hashes(folder / "new" / "bundle"))


@pytest.mark.slow  # two to seven minutes each
@pytest.mark.parametrize("fault", ["full", "interrupt", "kill"])
def test_a_build_goes_on_from_any_write_that_failed(start: Start, tmp_path: Path, fault: Fault) -> None:
    """Each run goes on from where the one before failed, up to the first write that did not fail yet."""
    settings = tiny_settings(tmp_path / "place")
    shutil.copytree(start.folder, tmp_path / "place")

    def work(writes: Writes) -> None:
        with opened(settings, writes) as run:
            build_bundle(run)

    seen = set()
    for change, end in each_write(tmp_path / "place", fault, work):
        assert end.startswith((ENDS[fault], "done", "WentOn")), (change, end)
        assert Bundle.open(settings.out).manifest in (start.old, start.new), change
        seen.add(change.partition(":")[0])
    assert hashes(settings.out) == start.undisturbed
    assert not leftovers(tmp_path)
    assert seen >= {
        "start",
        "static",
        "dynamic",
        "calibrate",
        "plan",
        "weights",
        "onnx segment-00",
        "onnx conditioning",
    }
