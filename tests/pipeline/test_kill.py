"""``kill -9`` at random moments, then the same command again: the bundle is that of an undisturbed build."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dyexport.bundle.manifest_file import MANIFEST
from dyexport.bundle.reader import Bundle
from dyexport.errors import BundleError
from dyexport.exporters.tensorrt_profiles import TensorrtSettings
from tests.pipeline.tiny import hashes, redone, tiny_settings

ROOT = Path(__file__).parents[2]
STAGE = re.compile(r"^(.+): (done|up to date)", re.MULTILINE)


def start(root: Path, *arguments: str) -> subprocess.Popen[str]:
    places = ["-o", str(root / "bundle"), "--work", str(root / "work")]
    command = [sys.executable, "-m", "dyexport", "build", "-m", "sit-tiny", *arguments, *places]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def stages(stderr: str) -> dict[str, bool]:
    """Finished stages, and whether each was done rather than found done."""
    return {name: state == "done" for name, state in STAGE.findall(stderr)}


def interrupt(root: Path, delay: float, arguments: tuple[str, ...]) -> dict[str, bool]:
    """Start a build, kill it after a while, and look at what it leaves behind."""
    process = start(root, *arguments)
    time.sleep(delay)
    process.kill()
    _, stderr = process.communicate()
    if (root / "bundle" / MANIFEST).exists():
        Bundle.open(root / "bundle")
    else:
        with pytest.raises(BundleError):
            Bundle.open(root / "bundle")
    return stages(stderr)


@pytest.mark.build
@pytest.mark.parametrize(
    ("kills", "arguments"),
    [
        (2, ("-b", "0.5", "--random-weights", "-k", "1", "--no-baseline")),
        # Four steps teach routers nothing, so that the only budget they can meet is the whole model.
        pytest.param(20, ("-b", "1", "--finetune-steps", "4"), marks=pytest.mark.slow),
    ],
)
def test_killed_builds_end_in_the_same_bundle(tmp_path: Path, kills: int, arguments: tuple[str, ...]) -> None:
    begin = time.perf_counter()
    undisturbed = start(tmp_path / "undisturbed", *arguments)
    _, stderr = undisturbed.communicate()
    seconds = time.perf_counter() - begin
    assert undisturbed.returncode == 0, stderr
    every = stages(stderr)

    done: set[str] = set()
    moments = random.Random(kills)
    for _ in range(kills):
        seen = interrupt(tmp_path / "killed", moments.uniform(0.2, 1.0) * seconds, arguments)
        redone = {name for name, again in seen.items() if again}
        assert not redone & done
        done |= seen.keys()

    last = start(tmp_path / "killed", *arguments)
    _, stderr = last.communicate()
    assert last.returncode == 0, stderr
    assert stages(stderr).keys() == every.keys()
    assert not {name for name, again in stages(stderr).items() if again} & done
    assert hashes(tmp_path / "killed" / "bundle") == hashes(tmp_path / "undisturbed" / "bundle")


@pytest.mark.tensorrt
def test_a_kill_during_plan_3_of_4_leaves_two_to_build(rtx: Any, tmp_path: Path) -> None:
    target = ("--target", "tensorrt-rtx", "--compute-capability", "8.9")
    process = start(tmp_path, "-b", "0.5", "--random-weights", "-k", "3", "--no-baseline", *target)
    os.sched_setaffinity(process.pid, {min(os.sched_getaffinity(0))})  # on one core, plans are made one by one
    assert process.stderr is not None
    seen = ""
    while len(kept := [stage for stage in stages(seen) if stage.startswith("tensorrt-rtx")]) < 2:
        seen += process.stderr.readline()
    time.sleep(0.2)
    process.kill()
    process.communicate()

    settings = tiny_settings(
        tmp_path, engines=3, targets=("tensorrt-rtx",), tensorrt=TensorrtSettings(compute_capabilities=("8.9",))
    )
    four = {f"tensorrt-rtx {name}" for name in ("segment-00", "segment-01", "segment-02", "conditioning")}
    assert redone(settings) == four - set(kept) | {"bundle"}
    assert redone(settings) == set()
