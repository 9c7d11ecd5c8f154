from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dyexport.engines.registry import BACKENDS, get_backend, make_engines
from dyexport.errors import UsageError


@pytest.mark.parametrize("target", BACKENDS)
def test_engines_are_made_without_their_file(target: str) -> None:
    engines = make_engines(target, [Path("absent"), Path("nowhere")])
    assert not any(engine.active for engine in engines)


def test_unknown_target_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'tensorflow'; known: onnx, onnx-rtx, torch"):
        get_backend("tensorflow")


def test_backends_are_imported_when_they_are_used() -> None:
    check = "import sys, dyexport.engines.registry; assert not {'torch', 'onnx', 'onnxruntime'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(__file__).parents[2])
