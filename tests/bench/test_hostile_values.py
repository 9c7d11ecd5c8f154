"""Whatever is given for a path, a number or a name: a result, or one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dyexport.cli import main
from tests.runtime.bundles import TinyBundle

NAMES = ["folder", "file", "bytes", "loop", "gone", "a\udcff", "[red]", "%s", "{x}", "--", " ", "a/../b", "/dev/null/x"]
NUMBERS = ["-1", "1e400", "nan", "-inf", "9" * 5000, "1_0", "٣", "0x10", "1.5", "true", "\t"]
HOSTILE = [*NAMES, *NUMBERS]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a directory, files, a link to itself and a broken link, all of which hostile values name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("{}")
    (tmp_path / "bytes").write_bytes(bytes(range(256)))
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nothing")
    return tmp_path


RunCommand = Callable[..., None]


@pytest.fixture
def run_command(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunCommand:
    """Return a function that runs ``dyexport`` and checks that a failure is explained in one sentence."""

    def command(*arguments: Any) -> None:
        monkeypatch.setattr(sys, "argv", ["dyexport", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        err = capsys.readouterr().err
        if exit_.value.code:
            last = err.strip().splitlines()[-1]
            assert last.startswith("dyexport: ")
            assert "this is a bug" not in last
            assert len(last) < 1500
        assert "Traceback" not in err

    return command


@pytest.mark.parametrize(
    "command", [("inspect",), ("verify",), ("sample",), ("eval",), ("bench",), ("deploy", "triton")]
)
def test_bundles(run_command: RunCommand, command: tuple[str, ...]) -> None:
    for value in HOSTILE:
        run_command(
            *command, *(["--", value] if value == "--" else [value]), *(["models"] if command[0] == "deploy" else [])
        )


@pytest.mark.parametrize("option", ["labels", "steps", "guidance", "seed", "scheduler", "target", "memory"])
def test_options_of_sample(run_command: RunCommand, ddpm: TinyBundle, option: str) -> None:
    for value in HOSTILE:
        run_command("sample", ddpm.root, "--height", "16", f"--{option}", value)  # refused at the latest for its height


@pytest.mark.parametrize(
    "option", ["name", "pipeline", "vae", "target", "scheduler", "memory", "instances", "max-batch"]
)
def test_options_of_deploy(run_command: RunCommand, ddpm: TinyBundle, option: str) -> None:
    for value in HOSTILE:
        run_command("deploy", "triton", ddpm.root, "models", f"--{option}", value)


@pytest.mark.parametrize("option", ["batch", "size", "target", "device", "pipeline", "memory", "out"])
def test_options_of_bench(run_command: RunCommand, ddpm: TinyBundle, option: str) -> None:
    for value in HOSTILE:
        run_command("bench", ddpm.root, "--size", "64", f"--{option}", value)  # refused at the latest for its size


@pytest.mark.parametrize("option", ["engine", "png"])
def test_options_of_inspect(run_command: RunCommand, ddpm: TinyBundle, option: str) -> None:
    for value in HOSTILE:
        run_command("inspect", ddpm.root, f"--{option}", value)


@pytest.mark.parametrize(
    "option", ["model", "budget", "td-lora", "lora", "data", "engines", "token-path", "precision", "seed"]
)
def test_options_of_a_build(run_command: RunCommand, place: Path, option: str) -> None:
    for value in HOSTILE:
        given = {"model": "dit-s-2", "budget": "0.5", "target": "paper", option: value}  # a target that there is not
        run_command("build", *(part for name, each in given.items() for part in (f"--{name}", each)))
    assert sorted(path.name for path in place.iterdir()) == ["bytes", "file", "folder", "gone", "loop"]


def test_a_link_to_itself_is_no_place_to_work_in(run_command: RunCommand) -> None:
    for option in ("--work", "--out"):
        run_command("build", "-m", "dit-s-2", "-b", "0.5", "--random-weights", option, "loop")
    run_command("export", "--work", "loop")
