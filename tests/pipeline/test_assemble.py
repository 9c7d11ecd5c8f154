"""A bundle appears whole or not at all, and what was there before stays until then."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dyexport.bundle.manifest import Manifest
from dyexport.bundle.manifest_file import MANIFEST, WIDTHS
from dyexport.bundle.reader import Bundle
from dyexport.errors import StorageError, UsageError
from dyexport.pipeline.assemble import Source, assemble
from dyexport.pipeline.output import STAGING, check_ours
from dyexport.stages.file_records import describe
from dyexport.stages.locking import locked_output
from tests.bundle.test_reader import GRAPH, manifest_of, root
from tests.pipeline.tiny import hashes

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
    assert sorted(path.name for path in (out / "graphs").iterdir()) == ["notes.txt", "segment-99.onnx", "weights.bin"]
    Bundle.open(out)


@pytest.mark.parametrize("way", ["folder", "file"])
def test_what_stands_in_the_way_is_not_overwritten(root: Path, out: Path, way: str) -> None:
    assemble(out, *parts(root))
    (root / GRAPH).rename(root / "graphs" / "segment-99.onnx")
    manifest, _ = parts_renamed(root, "segment-99.onnx")
    mine = out / "graphs" / "segment-99.onnx"
    if way == "folder":
        mine = mine / "mine.txt"
        mine.parent.mkdir()
    mine.write_text("mine")
    before = hashes(out)
    files = {name: Source(root / name, record) for name, record in manifest.files.items()}
    with pytest.raises(StorageError, match="was not written by dyexport, and the bundle needs a file of that name"):
        assemble(out, manifest, files)
    assert hashes(out) == before
    Bundle.open(out)


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
    return manifest, {**files, MOVED: files[MOVED]._replace(linked=True)}


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


def test_files_of_the_user_stay(root: Path, out: Path) -> None:
    assemble(out, *parts(root))
    (out / "notes.txt").write_text("mine")
    (out / "link").symlink_to("notes.txt")
    (out / "graphs" / "deep" / "empty").mkdir(parents=True)
    (out / "graphs" / "deep" / "mine.txt").write_text("mine")
    (out / "notes.txt").chmod(0o640)
    os.mkfifo(out / "pipe")
    inode = (out / "notes.txt").stat().st_ino
    (root / GRAPH).write_bytes(b"a new graph")
    assemble(out, *parts(root))
    assert (out / GRAPH).read_bytes() == b"a new graph"
    assert ((out / "notes.txt").stat().st_ino, (out / "notes.txt").stat().st_nlink) == (inode, 1)
    assert (out / "notes.txt").stat().st_mode & 0o777 == 0o640
    assert (out / "link").readlink() == Path("notes.txt")
    assert (out / "graphs" / "deep" / "mine.txt").read_text() == "mine"
    assert (out / "graphs" / "deep" / "empty").is_dir()
    assert (out / "pipe").is_fifo()


def test_a_link_to_the_bundle_stays_a_link(root: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "disk" / "bundle").mkdir(parents=True)
    out.symlink_to("disk/bundle")
    for content in (b"one graph", b"another"):
        (root / GRAPH).write_bytes(content)
        assemble(out, *parts(root))
        assert out.is_symlink()
        assert Bundle.open(tmp_path / "disk" / "bundle").manifest == parts(root)[0]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["bundle"]


@pytest.mark.parametrize("link", [True, False])
def test_a_bundle_is_replaced_where_the_shell_stands(
    root: Path, out: Path, link: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder is not exchanged: a shell would find itself in one that is gone."""
    assemble(out, *(moving(root) if link else parts(root)))
    (out / "graphs" / "mine.txt").write_text("mine")
    (out / "empty").mkdir()
    monkeypatch.chdir(out)
    inode = out.stat().st_ino
    (root / GRAPH).rename(root / "graphs" / "segment-99.onnx")
    manifest, _ = parts_renamed(root, "segment-99.onnx")
    files = {n: Source(root / n, record, linked=link and n == MOVED) for n, record in manifest.files.items()}
    assert not assemble(Path(), manifest, files)
    assert Bundle.open(out).manifest == manifest
    assert out.stat().st_ino == inode
    assert hashes(out).keys() == {MANIFEST, *manifest.files, "graphs/mine.txt"}
    assert (out / "empty").is_dir()
    assert (out / MOVED).stat().st_nlink == 1


def test_nothing_but_a_bundle_is_taken_for_one(root: Path, out: Path) -> None:
    check_ours(out)
    assemble(out, *parts(root))
    check_ours(out)
    content = json.loads((out / MANIFEST).read_bytes())
    for schema in (1, content["schema_version"], 99):
        (out / MANIFEST).write_text(json.dumps({**content, "schema_version": schema}))
        check_ours(out)
    strangers = ("{}", "[]", "", '{"name": "my web app", "schema_version": 3}', '{"files": [], "schema_version": 1}')
    for stranger in (*strangers, "[" * 100_000):
        (out / MANIFEST).write_text(stranger)
        with pytest.raises(UsageError, match="is not empty and not a bundle"):
            check_ours(out)


def test_one_build_at_a_time_writes_a_bundle(out: Path) -> None:
    with locked_output(out):
        with pytest.raises(StorageError, match="another command is writing"), locked_output(out):
            pass
        out.mkdir()
        with pytest.raises(StorageError, match="another command is writing"), locked_output(out):
            pass
    with locked_output(out):
        pass
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_lock_knows_a_folder_by_every_name(out: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("out")
    with locked_output(tmp_path / "link"), pytest.raises(StorageError, match="another"), locked_output(out):
        pass


def test_records_are_of_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    assert describe(tmp_path / "a")["."].bytes == 1
