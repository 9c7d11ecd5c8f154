"""A bundle appears whole or not at all, and what was there before stays until then."""

from __future__ import annotations

from pathlib import Path

import pytest

from dyexport.build.assemble import STAGING, Source, assemble
from dyexport.build.ledger import describe
from dyexport.bundle import MANIFEST, WIDTHS, Bundle
from dyexport.errors import StorageError
from dyexport.manifest import Manifest
from tests.build.tiny import hashes
from tests.test_bundle import GRAPH, manifest_of, root

__all__ = ["root"]  # a fixture
MOVED = WIDTHS


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def parts(root: Path) -> tuple[Manifest, dict[str, Source]]:
    manifest = Manifest.model_validate(manifest_of(root))
    return manifest, {name: Source(root / name, record) for name, record in manifest.files.items()}


def test_a_bundle_is_assembled_once(root: Path, out: Path) -> None:
    assert not assemble(out, *parts(root))
    assert Bundle.open(out).manifest == parts(root)[0]
    assert assemble(out, *parts(root))
    assert hashes(out).keys() == {MANIFEST, *parts(root)[0].files}


@pytest.mark.parametrize("harm", ["gone", "changed"])
def test_a_failure_leaves_the_bundle_of_before(root: Path, out: Path, harm: str) -> None:
    assemble(out, *parts(root))
    before = hashes(out)
    (root / GRAPH).write_bytes(b"a new graph")
    manifest, files = parts(root)
    if harm == "gone":
        (root / GRAPH).unlink()
    else:
        (root / GRAPH).write_bytes(b"a bad graph")
    with pytest.raises(StorageError):
        assemble(out, manifest, files)
    assert hashes(out) == before
    assert not (out / STAGING).exists()
    Bundle.open(out)


def test_a_failure_leaves_no_directory_that_was_not_there(root: Path, out: Path) -> None:
    manifest, files = parts(root)
    (root / GRAPH).unlink()
    with pytest.raises(StorageError, match=r"segment-00\.onnx: No such file"):
        assemble(out, manifest, files)
    assert not out.exists()


def test_files_of_the_bundle_before_go_and_others_stay(root: Path, out: Path) -> None:
    assemble(out, *parts(root))
    (out / "graphs" / "notes.txt").write_text("mine")
    other = root / "graphs" / "segment-99.onnx"
    (root / GRAPH).rename(other)
    manifest, _ = parts_renamed(root, other.name)
    files = {name: Source(root / name, record) for name, record in manifest.files.items()}
    assemble(out, manifest, files)
    assert sorted(path.name for path in (out / "graphs").iterdir()) == ["notes.txt", "segment-99.onnx"]
    Bundle.open(out)


def test_while_files_are_being_replaced_there_is_no_bundle(root: Path, out: Path) -> None:
    """The first file that cannot be placed stops it, when some of the new files are there already."""
    assemble(out, *parts(root))
    (root / GRAPH).rename(root / "graphs" / "segment-99.onnx")
    manifest, _ = parts_renamed(root, "segment-99.onnx")
    (out / "graphs" / "segment-99.onnx" / "in the way").mkdir(parents=True)
    files = {name: Source(root / name, record) for name, record in manifest.files.items()}
    with pytest.raises(StorageError, match="Is a directory"):
        assemble(out, manifest, files)
    assert not (out / MANIFEST).exists()


def parts_renamed(root: Path, graph: str) -> tuple[Manifest, Path]:
    """The manifest with its graph under another name."""
    (root / GRAPH).write_bytes((root / "graphs" / graph).read_bytes())
    content = manifest_of(root)
    (root / GRAPH).unlink()
    content["files"][f"graphs/{graph}"] = content["files"].pop(GRAPH)
    content["engines"][0]["path"] = f"graphs/{graph}"
    return Manifest.model_validate(content), root / "graphs" / graph


def test_a_kill_between_old_and_new_leaves_no_bundle_and_is_mended(root: Path, out: Path) -> None:
    """As a kill leaves it while files are being moved: no manifest, half the files, the staging directory."""
    manifest, files = parts(root)
    (out / STAGING / "graphs").mkdir(parents=True)
    (out / "calibration").mkdir()
    (out / STAGING / GRAPH).write_bytes(b"half")
    assert not assemble(out, manifest, files)
    assert hashes(out).keys() == {MANIFEST, *manifest.files}


def moving(root: Path) -> tuple[Manifest, dict[str, Source]]:
    """One file is moved, as a large model's store is."""
    manifest, files = parts(root)
    return manifest, {**files, MOVED: files[MOVED]._replace(moved=True)}


def test_a_moved_file_is_on_the_disk_once(root: Path, out: Path) -> None:
    content = (root / MOVED).read_bytes()
    assert not assemble(out, *moving(root))
    assert (root / MOVED).is_symlink()
    assert (root / MOVED).read_bytes() == content
    assert (out / MOVED).stat().st_nlink == 1
    assert hashes(out).keys() == {MANIFEST, *parts(root)[0].files}
    assert not (root / GRAPH).is_symlink()


def test_a_moved_file_stays_where_it_is_while_others_change(root: Path, out: Path) -> None:
    assemble(out, *moving(root))
    inode = (out / MOVED).stat().st_ino
    (root / GRAPH).write_bytes(b"a new graph")
    assert not assemble(out, *moving(root))
    assert (out / MOVED).stat().st_ino == inode
    assert (out / MOVED).stat().st_nlink == 1
    assert not (out / STAGING).exists()
    assert Bundle.open(out).manifest == moving(root)[0]


def test_a_file_that_another_bundle_has_is_copied(root: Path, out: Path, tmp_path: Path) -> None:
    assemble(out, *moving(root))
    assemble(tmp_path / "other", *moving(root))
    assert not (out / MOVED).samefile(tmp_path / "other" / MOVED)
    assert (root / MOVED).samefile(out / MOVED)


def test_a_kill_before_the_link_is_mended(root: Path, out: Path) -> None:
    """As a kill leaves it: the file has its place in the bundle, and its name in the work directory still."""
    manifest, files = moving(root)
    (out / MOVED).parent.mkdir(parents=True)
    (out / MOVED).hardlink_to(root / MOVED)
    assert not assemble(out, manifest, files)
    assert (root / MOVED).is_symlink()
    assert (out / MOVED).stat().st_nlink == 1


def test_records_are_of_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    assert describe(tmp_path / "a")["."].bytes == 1
