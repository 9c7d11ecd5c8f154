"""Metadata of pictures in Parquet."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from dyexport.encoding.layout import read_folder
from dyexport.errors import DataError, MissingDependencyError
from tests.encoding.test_layout import captions_of, files, labels_of, write
from tests.without import Without

NAMES = ("1.png", "more/2.png")


def metadata(root: Path, **columns: Any) -> Path:
    """Make a folder of two empty pictures with ``metadata.parquet``."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"file_name": NAMES, **columns}), files(root, *NAMES) / "metadata.parquet")
    return root


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_captions(column: str, tmp_path: Path) -> None:
    pictures = [{"bytes": b"x"}, None]  # of a data set whose files hold the pictures too
    root = metadata(tmp_path, **{column: ["a fox\n", "an owl"]}, image=pictures, score=[0.5, None], blob=[b"1", b"2"])
    assert captions_of(root) == {"1.png": "a fox", "more/2.png": "an owl"}


@pytest.mark.parametrize(
    ("values", "labels", "classes"),
    [([3, 0], (3, 0), ()), (["dog", "cat"], (1, 0), ("cat", "dog")), (["10", "2"], (0, 1), ("10", "2"))],
)
def test_labels(values: list[Any], labels: tuple[int, int], classes: tuple[str, ...], tmp_path: Path) -> None:
    assert labels_of(metadata(tmp_path, label=values)) == (dict(zip(NAMES, labels, strict=True)), classes)


def test_names_of_classes_may_be_categories(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    root = metadata(tmp_path, label=pyarrow.array(["dog", "cat"]).dictionary_encode())
    assert labels_of(root) == ({"1.png": 1, "more/2.png": 0}, ("cat", "dog"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [1.0, 2.0]}, r"parquet, row 1: label is 1.0; give the name of a class, or a whole number"),
        ({"label": [1, None]}, "parquet, row 2: label is None"),
        (
            {"file_name": ["1.png", None], "label": [1, 2]},
            r"row 2: no file_name among its columns \(file_name, label\)",
        ),
        (
            {"file_name": ["1.png", "3.png"], "label": [1, 2]},
            "row 2: no picture 3.png in .*; add it, or remove the row",
        ),
        ({"file_name": ["1.png", "1.png"], "label": [1, 2]}, "row 2: 1.png is described in .*parquet, row 1 too"),
    ],
)
def test_wrong_rows_are_named(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        labels_of(metadata(tmp_path, **columns))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    root = metadata(tmp_path, label=[1, 2])
    whole = (root / "metadata.parquet").read_bytes()
    for content in (b"", b"no table", whole[: len(whole) // 2]):
        (root / "metadata.parquet").write_bytes(content)
        with pytest.raises(
            DataError, match=r"cannot read .*metadata.parquet: .*; write it again, or as metadata.jsonl"
        ):
            labels_of(root)


def test_pyarrow_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    absent = frozenset({"pyarrow"})
    monkeypatch.setattr(sys, "meta_path", [Without(finder, absent) for finder in sys.meta_path])
    write(files(tmp_path, "1.png"), "metadata.parquet", "")
    with pytest.raises(
        MissingDependencyError, match=r"pyarrow is not installed; run: pip install 'dyexport\[parquet\]'"
    ):
        read_folder(tmp_path, takes_labels=False)
