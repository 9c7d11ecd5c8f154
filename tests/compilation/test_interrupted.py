"""A compilation that is killed resumes, and whatever write of its installation fails, the bundle opens."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dyexport.bundle.manifest import Manifest
from dyexport.bundle.reader import Bundle
from dyexport.compilation.api import compile_bundle
from dyexport.compilation.install import JOURNAL, finish_install, work_folder
from dyexport.compilation.jobs import bundle_jobs, compile_jobs
from dyexport.compilation.registry import CompileOptions, get_compiler
from dyexport.compilation.settings import CompileSettings
from dyexport.errors import StorageError
from dyexport.exporters.tensorrt_profiles import TensorrtSettings
from dyexport.files import PARTIAL, remove
from dyexport.stages.ledger import Ledger, NullListener
from dyexport.stages.locking import LOCK
from tests.built import built_once
from tests.compilation.bundles import ADA, RTX, compile_for, copy_of, everything_in
from tests.pipeline.faults import Fault, Writes, each_write
from tests.pipeline.tiny import build, hashes, tiny_settings

ROOT = Path(__file__).parents[2]
NETWORKS = ("segment-00", "segment-01", "segment-02", "conditioning")
ENDS = {"full": "StorageError", "kill": "killed"}
BLACKWELL = TensorrtSettings(compute_capabilities=("12.0",))


@pytest.mark.tensorrt
def test_killed_during_engine_3_of_4_it_resumes_with_2_done(rtx: Any, root: Path) -> None:
    command = ["compile", str(root), "--target", RTX, "--compute-capability", "8.9", "--jobs", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dyexport", *command], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    seen = ""
    while len(kept := re.findall(rf"^{RTX} (\S+): done", seen, re.MULTILINE)) < 2:
        line = process.stderr.readline()
        assert line, seen
        seen += line
    time.sleep(0.1)
    process.kill()
    process.communicate()
    before = Bundle.open(root)
    assert RTX not in {engine.target for engine in before.manifest.engines}

    done: dict[str, bool] = {}

    class Listener(NullListener):
        def finished(self, stage: str, seconds: float, *, reused: bool) -> None:
            done[stage.removeprefix(f"{RTX} ")] = not reused

    (result,) = compile_for(root, listener=Listener())
    assert result.seconds.keys() == done.keys() == set(NETWORKS)
    assert not any(done[network] for network in kept)
    assert sum(done.values()) == 4 - len(kept)
    assert Bundle.open(root).engine_paths(RTX).keys() == set(NETWORKS)
    assert [name for name in everything_in(root.parent) if not name.startswith("bundle/")] == []


@pytest.mark.tensorrt
def test_ctrl_c_says_how_many_engines_are_kept(rtx: Any, root: Path) -> None:
    command = ["compile", str(root), "--target", RTX, "--compute-capability", "8.9", "--jobs", "2"]
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits it ignored
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "dyexport", *command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, heard)
    assert process.stderr is not None
    assert process.stderr.readline() == f"{RTX}: compiling 4 engines, 2 at a time\n"
    assert (first := process.stderr.readline()).endswith(" s, 3 left\n"), first
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out) == (130, ""), err
    *finished, last = err.splitlines()
    kept = 1 + len(finished)
    assert last == f"dyexport: stopped; {kept} of 4 engines are kept; repeat the command to go on"
    assert len(Ledger(work_folder(root), NullListener()).records) == kept


class Start(NamedTuple):
    """A folder with a bundle that has old plans, and new ones that are compiled and not installed."""

    folder: Path
    old: Manifest
    new: Manifest
    undisturbed: dict[str, str]


SEVERAL = pytest.param((0.5, 0.3), marks=pytest.mark.slow, id="budgets")


@pytest.fixture(scope="module", params=[pytest.param((), id="one"), SEVERAL])
def start(
    rtx: Any, shared_folder: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Start:
    folder, budgets = tmp_path_factory.mktemp("start"), request.param
    built = built_once(shared_folder / f"two-networks-{len(budgets)}", token_path="dynamic", budgets=budgets)
    root = copy_of(built, folder)
    compile_for(root, tensorrt=BLACKWELL)
    old = Bundle.open(root)
    compiler = get_compiler(RTX, CompileOptions(tensorrt=ADA), folder / "timings")
    ledger = Ledger(work_folder(root), NullListener())
    for each in old.at_each_budget():
        compile_jobs(ledger, compiler, bundle_jobs(each), lambda stage: lambda done, total: None, label=each.label)
    (root / "notes.txt").write_text("mine")
    place = folder.with_name(f"{folder.name}-undisturbed")
    shutil.copytree(folder, place)
    compile_for(place / "bundle")
    return Start(folder, old.manifest, Bundle.open(place / "bundle").manifest, hashes(place))


@pytest.mark.tensorrt
@pytest.mark.parametrize("fault", ["kill", pytest.param("full", marks=pytest.mark.slow)])
def test_engines_are_added_whatever_write_fails(start: Start, tmp_path: Path, fault: Fault) -> None:
    """Each time from the same start, then once more without a fault, which leaves no trace of the failure."""
    place = tmp_path / "place"
    settings = CompileSettings(targets=(RTX,), tensorrt=ADA)

    def reset() -> None:
        remove(place)
        shutil.copytree(start.folder, place)

    def compile_again(writes: Writes) -> None:
        compile_bundle(place / "bundle", settings, writes)

    seen = []
    for change, end in each_write(place, fault, compile_again, reset):
        assert end == "done" or end.startswith(ENDS[fault]), (change, end)
        assert Bundle.open(place / "bundle").manifest in (start.old, start.new), change
        compile_for(place / "bundle")
        found = {name: digest for name, digest in hashes(place).items() if LOCK not in name}  # a lock file is reused
        assert found == start.undisturbed, change
        seen.append(change)
    for part in (JOURNAL, "os.link", "fsync", "os.rename /bundle/engines", "os.rename /bundle/manifest.json", "remove"):
        assert any(part in change for change in seen), part


def test_a_build_cleans_up_after_a_killed_compilation(tmp_path: Path) -> None:
    """A plan was placed, and the manifest was not replaced."""
    settings = tiny_settings(tmp_path, engines=1, token_path="dynamic")
    root = build(settings).root
    before = hashes(root)
    place = root / "engines" / RTX / "segment-00"
    place.mkdir(parents=True)
    (place / "engine.plan").write_bytes(b"left")
    (place.with_name(f"{PARTIAL}99999999-1-segment-00")).mkdir()
    work_folder(root).mkdir()
    (work_folder(root) / JOURNAL).write_text(f'{{"added": ["engines/{RTX}/segment-00"], "replaced": []}}')
    build(settings)
    assert hashes(root) == before
    assert not (root / "engines").exists()


def test_a_folder_of_the_user_is_not_taken_for_work(root: Path, rtx: Any) -> None:
    mine = work_folder(root) / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(StorageError, match=r"mine\.txt was not written by dyexport; move it"):
        compile_for(root)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("name", ["../../mine", "engines/../../../mine"])
def test_a_journal_removes_nothing_outside_the_bundle(root: Path, name: str) -> None:
    mine = root.parents[1] / "mine"
    mine.write_text("mine")
    work_folder(root).mkdir()
    (work_folder(root) / JOURNAL).write_text(f'{{"added": ["{name}"], "replaced": ["{name}"]}}')
    finish_install(root)
    assert mine.read_text() == "mine"
