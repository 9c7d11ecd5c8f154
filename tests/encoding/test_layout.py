"""Layouts of folders: what is read, and what is refused before any picture is opened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dyexport.encoding.layout import is_picture_folder, read_folder
from dyexport.errors import DataError, DyexportError


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
        (["1.png"], {}, "holds pictures and no subfolders; put each picture into the subfolder of its class"),
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
    ],
)
def test_other_layouts_are_refused(names: list[str], options: dict[str, object], message: str, tmp_path: Path) -> None:
    files(tmp_path, *names)
    with pytest.raises(DyexportError, match=message):
        read_folder(tmp_path, **{"takes_labels": True, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.jsonl", '{"file_name": "2.png", "text": "x"}', "line 1: a caption without a picture, 2.png"),
        ("metadata.jsonl", '{"text": "x"}', "line 1: no file_name"),
        ("metadata.jsonl", '\n{"file_name": "1.png"}', "line 2: no caption"),
        ("metadata.jsonl", '{"file_name": "1.png", "text": "x", "prompt": "y"}', "both text and prompt"),
        ("metadata.jsonl", '{"file_name": "1.png", "text": "x"}\n' * 2, "line 2: 1.png has a caption already"),
        ("metadata.jsonl", "[1]", "line 1 is no JSON object; write one picture per line"),
        ("metadata.jsonl", "{", "cannot read .*metadata.jsonl"),
        ("metadata.csv", 'file_name,text\n1.png,"x', "cannot read .*metadata.csv"),
        ("metadata.csv", "file_name,label\n1.png,x\n", "line 2: no caption"),
    ],
)
def test_wrong_metadata_is_named(name: str, text: str, message: str, tmp_path: Path) -> None:
    write(files(tmp_path, "1.png"), name, text)
    with pytest.raises(DataError, match=message):
        read_folder(tmp_path, takes_labels=False)


def test_a_folder_of_latents_is_none_of_pictures(tmp_path: Path) -> None:
    assert not is_picture_folder(tmp_path)
    assert not is_picture_folder(tmp_path / "gone")
    assert is_picture_folder(files(tmp_path, "cats/1.png"))
    assert not is_picture_folder(files(tmp_path, "a.safetensors"))
