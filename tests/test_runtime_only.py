"""A bundle runs without the libraries that built it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from dyexport.bundle.reader import Bundle
from dyexport.errors import EXTRAS

ROOT = Path(__file__).parents[1]
BUILD = tuple(name for name, extra in EXTRAS.items() if extra in ("build", "prompts"))


def without(libraries: tuple[str, ...], *command: str) -> subprocess.CompletedProcess[str]:
    """Run dyexport where these libraries cannot be imported."""
    script = [sys.executable, "-m", "tests.without", ",".join(libraries)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([*script, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_bundle_is_sampled_without_them(sit_tiny: Bundle, tmp_path: Path) -> None:
    picture = tmp_path / "digits.png"
    done = without(BUILD, "sample", str(sit_tiny.root), "-o", str(picture), "--steps", "2")
    assert done.returncode == 0, done.stderr
    with Image.open(picture) as image:
        image.verify()


def test_what_needs_them_names_their_extra() -> None:
    done = without(BUILD, "build", "-m", "sit-digits", "-b", "0.5", "-o", "x")
    assert done.returncode == 1
    (sentence,) = done.stderr.strip().splitlines()
    assert sentence.endswith(" is not installed; run: pip install 'dyexport[build]'")
    assert done.stdout == ""


def test_options_that_need_them_name_their_extra(sit_tiny: Bundle) -> None:
    done = without(BUILD, "verify", str(sit_tiny.root), "--layers")
    assert done.returncode == 2
    (sentence,) = done.stderr.strip().splitlines()
    assert sentence.startswith("dyexport: --layers needs the reference, and ")
    assert sentence.endswith(", or run: pip install 'dyexport[build]'")
    assert done.stdout == ""


def test_without_onnx_runtime_its_extra_is_named(sit_tiny: Bundle) -> None:
    done = without(("onnxruntime",), "sample", str(sit_tiny.root), "-o", "x.png", "--steps", "2")
    assert done.returncode == 1
    assert "onnxruntime is not installed; run: pip install 'dyexport[cpu]'" in done.stderr
