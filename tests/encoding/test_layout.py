"""Layouts of folders: what is read, and what is refused before any picture is opened."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from pathlib import Path

import pytest

from dyexport.encoding.layout import is_picture_folder, read_folder
from dyexport.errors import DataError, DyexportError, DyexportWarning


def files(root: Path, *names: str) -> Path:
    """Make empty files: a layout is read by names alone."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def captions_of(root: Path) -> dict[str, str | None]:
    folder = read_folder(root, takes_labels=False)
    return {folder.name_of(picture): picture.caption for picture in folder.pictures}


def test_classes_are_subfolders_in_sorted_order(tmp_path: Path) -> None:
    files(tmp_path, "dogs/1.JPG", "cats/deep/2.png", "cats/1.webp", "cats/notes.md", ".cache/1.png", "dogs/.hidden.png")
    folder = read_folder(tmp_path, takes_labels=True)
    assert folder.classes == ("cats", "dogs")
    assert [(folder.name_of(picture), picture.label) for picture in folder.pictures] == [
        ("cats/1.webp", 0),
        ("cats/deep/2.png", 0),
        ("dogs/1.JPG", 1),
    ]


def test_a_file_of_names_sets_the_order_of_labels(tmp_path: Path) -> None:
    files(tmp_path / "pictures", "cats/1.png", "dogs/1.png")
    names = tmp_path / "names.txt"
    names.write_text("dogs\nbirds\ncats\n")
    folder = read_folder(tmp_path / "pictures", takes_labels=None, names=names)
    assert folder.classes == ("dogs", "birds", "cats")
    assert [picture.label for picture in folder.pictures] == [0, 2]
    names.write_text("dogs\nbirds\n")
    with pytest.raises(DataError, match="the subfolder 'cats' is no line of --classes"):
        read_folder(tmp_path / "pictures", takes_labels=None, names=names)


def test_the_split_for_training_is_taken_unless_another_is_named(tmp_path: Path) -> None:
    files(tmp_path, "train/cats/1.png", "train/dogs/2.png", "test/cats/3.png", "test/dogs/4.png", "README.md")
    assert [picture.file.name for picture in read_folder(tmp_path, takes_labels=True).pictures] == ["1.png", "2.png"]
    other = read_folder(tmp_path, takes_labels=True, split="test")
    assert [picture.file.name for picture in other.pictures] == ["3.png", "4.png"]


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_captions_of_metadata(kind: str, column: str, tmp_path: Path) -> None:
    files(tmp_path, "1.png", "more/2.png")
    rows = {"1.png": 'a "quoted", long\u2028one', "more/2.png": "another\nline"}
    if kind == "jsonl":
        lines = [
            json.dumps({"file_name": name, column: text, "id": 3}, ensure_ascii=False) for name, text in rows.items()
        ]
    else:
        quoted = {name: text.replace('"', '""') for name, text in rows.items()}
        lines = [f"file_name,{column}", *(f'{name},"{text}"' for name, text in quoted.items())]
    (tmp_path / f"metadata.{kind}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert captions_of(tmp_path) == rows


def test_metadata_may_lie_in_each_folder(tmp_path: Path) -> None:
    files(tmp_path, "a/1.png", "b/1.png")
    for name in ("a", "b"):
        (tmp_path / name / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "text": name}))
    assert captions_of(tmp_path) == {"a/1.png": "a", "b/1.png": "b"}


def test_captions_of_text_files(tmp_path: Path) -> None:
    files(tmp_path, "1.png", "b/2.jpg")
    (tmp_path / "1.txt").write_text(" a lighthouse \n")
    (tmp_path / "b" / "2.txt").write_text("")
    assert captions_of(tmp_path) == {"1.png": "a lighthouse", "b/2.jpg": ""}


def write(root: Path, name: str, text: str) -> None:
    files(root, name).joinpath(name).write_text(text)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ([], {}, "holds no pictures"),
        (["a.txt"], {"takes_labels": False}, "holds no pictures"),
        (
            ["1.png"],
            {},
            "holds pictures and no subfolders; .* or add metadata.jsonl with the columns file_name and label",
        ),
        (["1.png", "cats/2.png"], {}, r"holds pictures in itself \(1.png\) and in subfolders \(cats\)"),
        (["cats/1.png", "dogs/note.md"], {}, "class 'dogs' holds no pictures"),
        (["cats/1.png", "cats/1.txt"], {"takes_labels": None}, r"has captions \(cats/1.txt\).*give --pipeline"),
        (["1.png", "metadata.csv"], {"takes_labels": None}, r"has captions \(metadata.csv\)"),
        (["1.png"], {"takes_labels": False}, "pictures without captions in .*: 1.png; .*a text file 1.txt"),
        (["1.png", "2.png", "3.png", "3.txt"], {"takes_labels": False}, "1.png and 1 more"),
        (["1.png", "1.txt", "2.txt"], {"takes_labels": False}, "a caption without a picture: 2.txt"),
        (["1.png", "1.txt", "metadata.jsonl"], {"takes_labels": False}, "captions in metadata.jsonl and in 1.txt"),
        (["cats/1.png"], {"split": "train"}, "--split is 'train', and .* has no splits"),
        (["val/cats/1.png", "test/cats/1.png"], {}, "has the splits test, val; give one of them as --split"),
        (["train/cats/1.png"], {"split": "dev"}, "has the splits train, not 'dev'"),
        (["train/cats/1.png"], {"split": ""}, "has the splits train, not ''"),
        (
            ["cats/1.png"],
            {"names": Path("gone")},
            "cannot read --classes gone: No such file or directory; give a text file",
        ),
    ],
)
def test_other_layouts_are_refused(names: list[str], options: dict[str, object], message: str, tmp_path: Path) -> None:
    files(tmp_path, *names)
    with pytest.raises(DyexportError, match=message):
        read_folder(tmp_path, **{"takes_labels": True, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.jsonl", '{"file_name": "2.png", "text": "x"}', "line 1: no picture 2.png in .*; add it, or remove"),
        ("metadata.jsonl", '{"text": "x"}', r"line 1: no file_name among its columns \(text\)"),
        ("metadata.jsonl", '\n{"file_name": "1.png"}', "line 2: no caption"),
        ("metadata.jsonl", '{"file_name": "1.png", "text": "x", "prompt": "y"}', "both text and prompt"),
        (
            "metadata.jsonl",
            '{"file_name": "1.png", "text": "x"}\n' * 2,
            "jsonl, line 2: 1.png is described in .*jsonl, line 1 too; keep one",
        ),
        ("metadata.jsonl", '{"file_name": "1.png", "text": 5}', "line 1: text is 5; give a text"),
        ("metadata.jsonl", "[1]", "metadata.jsonl, line 1: no JSON object; write one picture per line"),
        ("metadata.jsonl", "\n\n{", "cannot read .*metadata.jsonl, line 3: .* at character 2; write one JSON object"),
        ("metadata.csv", "file_name;text\n1.png;x\n", r"line 2: no file_name among its columns \(file_name;text\)"),
        ("metadata.csv", 'file_name,text\n1.png,"x', "cannot read .*metadata.csv, line 2: "),
        (
            "metadata.csv",
            "file_name,text\n1.png,a fox, red\n",
            "line 2: it has more fields than the 2 columns; put texts",
        ),
        (
            "metadata.jsonl",
            '{"file_name": "a.gif", "text": "x"}',
            "line 1: a.gif is not read: .* none of .png, .*; save it",
        ),
        ("metadata.csv", "file_name,text,text\n1.png,a,b\n", "line 1: it names the column text twice; keep one of"),
        ("metadata.csv", "file_name,label\n1.png,x\n", "line 2: no caption"),
    ],
)
def test_wrong_metadata_is_named(name: str, text: str, message: str, tmp_path: Path) -> None:
    write(files(tmp_path / "pictures", "1.png"), name, text)
    write(tmp_path / "pictures", "a.gif", "")
    with pytest.warns(DyexportWarning, match="a.gif"), pytest.raises(DataError, match=message):
        read_folder(tmp_path / "pictures", takes_labels=False)


def test_a_folder_may_be_named_by_a_detour(tmp_path: Path) -> None:
    write(files(tmp_path / "a", "1.png", "b/2.png"), "metadata.csv", "file_name,text\n1.png,a fox\n./b/2.png,an owl\n")
    assert captions_of(tmp_path / "a" / "b" / "..") == {"1.png": "a fox", "b/2.png": "an owl"}


def test_names_may_be_in_composed_and_in_decomposed_characters(tmp_path: Path) -> None:
    names = [unicodedata.normalize(form, "caf\u00e9.png") for form in ("NFD", "NFC")]
    write(files(tmp_path, names[0]), "metadata.csv", f"file_name,text\n{names[1]},a cup\n")
    assert captions_of(tmp_path) == {names[0]: "a cup"}


def test_metadata_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    files(tmp_path, "1.png", "metadata.csv")
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\n1.png,caf\xe9\n")
    with pytest.raises(DataError, match=r"cannot read .*metadata.csv: 'utf-8' codec .*; save it as UTF-8"):
        captions_of(tmp_path)
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.csv").symlink_to("gone")
    with pytest.raises(DataError, match=r"cannot read .*metadata.csv: No such file or directory; make it readable"):
        captions_of(tmp_path)


def test_metadata_next_to_splits_are_warned_of(tmp_path: Path) -> None:
    files(tmp_path, "train/cats/1.png", "test/cats/2.png", "metadata.csv")
    with pytest.warns(
        DyexportWarning, match=r"metadata.csv in .* is not read, for .* has splits; move its rows to .*train"
    ):
        assert labels_of(tmp_path)[1] == ("cats",)


def test_text_files_of_no_picture_may_lie_next_to_metadata(tmp_path: Path) -> None:
    write(files(tmp_path, "1.png", "LICENSE.txt"), "metadata.jsonl", '{"file_name": "1.png", "text": "a fox"}')
    assert captions_of(tmp_path) == {"1.png": "a fox"}


def labels_of(root: Path, names: Path | None = None) -> tuple[dict[str, int | None], tuple[str, ...]]:
    folder = read_folder(root, takes_labels=True, names=names)
    return {folder.name_of(picture): picture.label for picture in folder.pictures}, folder.classes


@pytest.mark.parametrize(
    ("name", "values", "labels", "classes"),
    [
        ("metadata.jsonl", ('"dog"', '"cat"', '"dog"'), (1, 0, 1), ("cat", "dog")),
        ("metadata.jsonl", ("3", "0", "1"), (3, 0, 1), ()),
        ("metadata.jsonl", ('"10"', '"2"', '"2"'), (0, 1, 1), ("10", "2")),
        ("metadata.csv", ("dog", "cat", "dog"), (1, 0, 1), ("cat", "dog")),
        ("metadata.csv", ("10", "2", "0"), (10, 2, 0), ()),
    ],
)
def test_labels_of_metadata(
    name: str, values: tuple[str, ...], labels: tuple[int, ...], classes: tuple[str, ...], tmp_path: Path
) -> None:
    pictures = ("1.png", "2.png", "more/3.png")
    files(tmp_path, *pictures)
    rows = zip(pictures, values, strict=True)
    if name.endswith(".csv"):
        lines = ["file_name,text,label", *(f"{file},a fox,{value}" for file, value in rows)]
    else:
        lines = [f'{{"file_name": "{file}", "text": "a fox", "label": {value}}}' for file, value in rows]
    (tmp_path / name).write_text("\n".join(lines))
    assert labels_of(tmp_path) == (dict(zip(pictures, labels, strict=True)), classes)
    assert set(captions_of(tmp_path).values()) == {"a fox"}


def test_a_file_of_names_has_the_classes_of_metadata(tmp_path: Path) -> None:
    root, names = tmp_path / "pictures", tmp_path / "names.txt"
    write(files(root, "1.png"), "metadata.jsonl", '{"file_name": "1.png", "label": "dog"}')
    names.write_text("dog\nbird\ncat\n")
    assert labels_of(root, names) == ({"1.png": 0}, ("dog", "bird", "cat"))
    write(root, "metadata.jsonl", '{"file_name": "1.png", "label": 2}')
    assert labels_of(root, names) == ({"1.png": 2}, ("dog", "bird", "cat"))
    for value, message in (("3", "label is 3, and --classes names 3; add lines"), ('"cow"', "'cow' is no line of")):
        write(root, "metadata.jsonl", f'{{"file_name": "1.png", "label": {value}}}')
        with pytest.raises(DataError, match=f"line 1: .*{message}"):
            labels_of(root, names)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"file_name": "1.png", "label": "a"}'], "pictures without labels in .*: 2.png; add a line"),
        (['{"file_name": "1.png", "label": 1}', '{"file_name": "2.png", "label": "a"}'], "two kinds, 'a' and 1"),
        (['{"file_name": "1.png", "label": -1}', '{"file_name": "2.png", "label": 0}'], "line 1: label is -1"),
        (['{"file_name": "1.png", "label": 1}', '{"file_name": "2.png"}'], "line 2: label is None; give the name of"),
        (['{"file_name": "1.png"}', '{"file_name": "2.png", "label": 0}'], "line 1: label is None; give the name of a"),
        (['{"file_name": "1.png", "label": true}', '{"file_name": "2.png", "label": 0}'], "line 1: label is True"),
    ],
)
def test_wrong_labels_are_named(lines: list[str], message: str, tmp_path: Path) -> None:
    write(files(tmp_path, "1.png", "2.png"), "metadata.jsonl", "\n".join(lines))
    with pytest.raises(DataError, match=message):
        labels_of(tmp_path)


@pytest.mark.parametrize("value", ["1.0", "-1", "+2", "3."])
def test_numbers_of_csv_that_are_no_labels_are_not_names(value: str, tmp_path: Path) -> None:
    write(files(tmp_path, "1.png"), "metadata.csv", f"file_name,label\n1.png,{value}\n")
    with pytest.raises(
        DataError, match=rf"line 2: label is '{re.escape(value)}'; give the name of a class, or a whole"
    ):
        labels_of(tmp_path)


def test_labels_of_classes_with_pictures_in_subfolders_are_read(tmp_path: Path) -> None:
    """Labels that only some rows have are refused: the subfolders are not taken for classes in their place."""
    lines = ['{"file_name": "a/1.png"}', '{"file_name": "b/2.png", "label": "fox"}']
    write(files(tmp_path, "a/1.png", "b/2.png"), "metadata.jsonl", "\n".join(lines))
    with pytest.raises(DataError, match="line 1: label is None"):
        labels_of(tmp_path)


def test_pictures_in_other_formats_are_not_left_out_silently(tmp_path: Path) -> None:
    files(tmp_path, "cats/1.png", "cats/2.HEIC", "dogs/1.png", "dogs/2.gif", "dogs/3.gif")
    with pytest.warns(DyexportWarning, match=r"\(.gif, .heic\), such as cats/2.HEIC; 3 are left out; save them as PNG"):
        assert len(read_folder(tmp_path, takes_labels=True).pictures) == 2


def test_links_that_lead_back_are_not_followed(tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    files(root, "cats/1.png", "dogs/1.png")
    files(tmp_path, "elsewhere/2.png")
    (root / "cats" / "more").symlink_to(tmp_path / "elsewhere")
    for name, target in (("up", root), ("itself", root / "cats"), ("above", tmp_path)):
        (root / "cats" / name).symlink_to(target)
    (tmp_path / "elsewhere" / "back").symlink_to(root / "cats")
    assert labels_of(root)[0] == {"cats/1.png": 0, "cats/more/2.png": 0, "dogs/1.png": 1}


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files(tmp_path, "cats/1.png")
    monkeypatch.chdir(tmp_path / "cats")
    for _ in range(20):  # a path that is too long to be opened
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    with pytest.raises(DataError, match=r"cannot list the folder .*: File name too long; make it readable, or remove"):
        read_folder(tmp_path, takes_labels=True)


def test_a_folder_of_latents_is_none_of_pictures(tmp_path: Path) -> None:
    assert not is_picture_folder(tmp_path)
    assert not is_picture_folder(tmp_path / "gone")
    assert is_picture_folder(files(tmp_path, "cats/1.png"))
    assert not is_picture_folder(files(tmp_path, "a.safetensors"))
