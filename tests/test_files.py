"""A file or folder is replaced as a whole, and nothing but a file or folder ever is."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dyexport.errors import StorageError
from dyexport.files import replacing, storage_errors


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(folder: Path, content: str) -> None:
    folder.mkdir()
    (folder / "a.txt").write_text(content)


def test_a_file_is_replaced(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with replacing(tmp_path / "deep" / "a.txt") as partial:
            partial.write_text(content)
        assert (tmp_path / "deep" / "a.txt").read_text() == content
    assert names(tmp_path / "deep") == ["a.txt"]


def test_a_folder_is_replaced(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with replacing(tmp_path / "made") as partial:
            fill(partial, content)
        assert (tmp_path / "made" / "a.txt").read_text() == content
    assert names(tmp_path) == ["made"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    fill(tmp_path / "made", "one")

    def fail(partial: Path) -> None:
        fill(partial, "two")
        raise error

    with pytest.raises(error), replacing(tmp_path / "made") as partial:
        fail(partial)
    assert (tmp_path / "made" / "a.txt").read_text() == "one"
    assert names(tmp_path) == ["made"]


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere/a.txt")  # to a file that is not there yet
    for content in ("one", "two"):
        with replacing(tmp_path / "link") as partial:
            partial.write_text(content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "elsewhere" / "a.txt").read_text() == content


def test_a_link_itself_can_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("one")
    (tmp_path / "link").symlink_to("kept.txt")
    with replacing(tmp_path / "link", follow_symlinks=False) as partial:
        partial.write_text("two")
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "kept.txt").read_text() == "one"


def test_a_pipe_is_refused_and_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(StorageError, match="is a device or a pipe"), replacing(tmp_path / name):
            pass
    assert (tmp_path / "pipe").is_fifo()


def test_a_device_is_refused_and_stays() -> None:
    _, terminal = os.openpty()
    path = Path(os.ttyname(terminal))
    with pytest.raises(StorageError, match="is a device or a pipe"), replacing(path):
        pass
    assert path.is_char_device()


@pytest.mark.parametrize("path", ["/", "", "."])
def test_what_is_no_file_is_refused(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match="give"), replacing(Path(path)) as partial:
        partial.write_text("one")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    fill(tmp_path / "made", "one")
    with pytest.raises(StorageError, match="is a folder"), replacing(tmp_path / "made") as partial:
        partial.write_text("two")
    assert (tmp_path / "made" / "a.txt").read_text() == "one"
    assert names(tmp_path) == ["made"]


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.txt") as first, replacing(tmp_path / "a.txt") as second:
        first.write_text("one")
        second.write_text("two")
    assert (tmp_path / "a.txt").read_text() == "one"
    assert names(tmp_path) == ["a.txt"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    killed = (
        "import os, pathlib; from dyexport.files import replacing\n"
        "with replacing(pathlib.Path('made')) as partial:\n"
        "    partial.mkdir(); (partial / 'half.txt').touch(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", killed], cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert len(names(tmp_path)) == 1
    with replacing(tmp_path / "made") as partial:
        fill(partial, "one")
    assert names(tmp_path) == ["made"]
    assert names(tmp_path / "made") == ["a.txt"]


def test_a_folder_put_aside_comes_back(tmp_path: Path) -> None:
    """As a kill leaves it between two renames, where the file system cannot exchange two names."""
    fill(tmp_path / ".partial-old-made", "one")
    with pytest.raises(ValueError, match="no"), replacing(tmp_path / "made"):
        raise ValueError("no")
    assert (tmp_path / "made" / "a.txt").read_text() == "one"
    assert names(tmp_path) == ["made"]


def test_a_full_disk_is_blamed_on_what_is_written(tmp_path: Path) -> None:
    """No file may grow beyond 1000 bytes, which the copy's destination would."""
    (tmp_path / "source").write_bytes(b"x" * 100_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with (
            pytest.raises(StorageError, match=r"cannot write \S+/copy: File too large"),
            replacing(tmp_path / "copy") as to,
        ):
            shutil.copyfile(tmp_path / "source", to)
        with pytest.raises(StorageError, match=r"cannot write \S+/other: File too large"), storage_errors(tmp_path):
            shutil.copyfile(tmp_path / "source", tmp_path / "other")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_tensors_are_readable_by_whom_other_files_are(tmp_path: Path, umask: int) -> None:
    """Others' files keep their modes, as do files of tensors that have another name elsewhere."""
    (tmp_path / "linked.safetensors").touch(0o600)
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "one.safetensors") as partial:
            save_file({"a": np.zeros(1)}, partial)
        with replacing(tmp_path / "folder") as partial:
            (partial / "deep").mkdir(parents=True)
            save_file({"a": np.zeros(1)}, partial / "deep" / "two.safetensors")
            (partial / "notes.txt").touch(0o600)
            os.link(tmp_path / "linked.safetensors", partial / "linked.safetensors")
        (tmp_path / "plain").touch()
    finally:
        os.umask(before)
    names = ("one.safetensors", "folder/deep/two.safetensors", "folder/notes.txt", "linked.safetensors", "plain")
    one, two, notes, linked, plain = ((tmp_path / name).stat().st_mode & 0o777 for name in names)
    assert one == two == plain == 0o666 & ~umask
    assert notes == linked == 0o600
    assert {path.name for path in tmp_path.iterdir()} == {"one.safetensors", "folder", "linked.safetensors", "plain"}
