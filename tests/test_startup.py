"""Help, wrong options and looking into a bundle import no torch, which takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.bundles import write_bundle

ROOT = Path(__file__).parents[1]
SCRIPT = """
import sys
from dyexport.cli import main

sys.argv = ["dyexport", *sys.argv[1:]]
try:
    main()
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""


def run(*arguments: str, cwd: Path) -> tuple[int, str, bool]:
    """Run ``dyexport``: exit code, stdout, and whether torch was imported."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, {"True": True, "False": False}[done.stderr.splitlines()[-1]]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("--help", 0),
        ("--version", 0),
        ("build --help", 0),
        ("verify -h", 0),
        ("models", 0),
        ("targets", 0),
        ("bild", 2),
        ("build", 2),
        ("build --model typo --budget 0.5", 2),
        ("build --model sit-digits --budget 2", 2),
        ("build --model sit-digits --budget half", 2),
        ("build --model sit-digits --budget 0.5 --target paper", 2),
        ("build --model sit-digits --budget 0.5 --precision fp23", 2),
        ("build --model sit-digits --budget 0.5 --td-lora rank=-1", 2),
        ("build --model sit-digits --budget 0.5 --color red", 2),
        ("finetune --work nowhere", 2),
        ("export", 2),
        ("sample nowhere --guidance nan", 2),
        ("sample nowhere", 1),
        ("verify nowhere --timesteps 0", 2),
        ("verify nowhere", 1),
        ("doctor --verbose", 2),
        ("doctor nowhere", 1),
        ("bench nowhere --batch 0", 2),
        ("bench nowhere", 1),
        ("eval nowhere --samples 1", 2),
        ("eval nowhere", 1),
    ],
)
def test_torch_is_not_imported(line: str, code: int, tmp_path: Path) -> None:
    found, _, torch = run(*line.split(), cwd=tmp_path)
    assert (found, torch) == (code, False)
    assert list(tmp_path.iterdir()) == []


def test_inspect_imports_no_torch(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", objective="flow", segments=2)
    code, out, torch = run("inspect", str(bundle.root), "--json", cwd=tmp_path)
    assert (code, torch) == (0, False)
    assert len(json.loads(out)["segments"]) == 2
    code, out, torch = run("inspect", str(bundle.root), "--png", "widths.png", cwd=tmp_path)
    assert (code, torch) == (0, False)
    assert "attention heads" in out
