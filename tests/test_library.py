"""The library: examples of its docstrings run, and what it returns says what it is."""

from __future__ import annotations

import doctest
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dyexport
from dyexport.bundle.reader import MANIFEST, Bundle
from dyexport.errors import UsageError
from tests.built import in_turn

PUBLIC = [name for name in dyexport.__all__ if not name.startswith("__")]


@pytest.fixture(scope="session")
def folder(shared_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundle of the examples, ``sit-digits-0.5``, which they may replace."""
    shared = shared_folder / "library"
    bundle = shared / "sit-digits-0.5"
    with in_turn(shared):
        if not (bundle / MANIFEST).exists():
            dyexport.build("sit-digits", budget=0.5, random_weights=True, engines=2, out=bundle)
    return Path(shutil.copytree(shared, tmp_path_factory.mktemp("library") / "copy"))


@pytest.fixture
def inside(folder: Path) -> Iterator[Path]:
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def examples() -> list[doctest.DocTest]:
    """Docstrings with examples: of the package, and of everything public."""
    finder = doctest.DocTestFinder(recurse=False)
    objects = [("dyexport", dyexport), *((name, getattr(dyexport, name)) for name in PUBLIC)]
    tests = [
        test
        for name, thing in objects
        for test in finder.find(thing, name, module=sys.modules[getattr(thing, "__module__", "dyexport")])
    ]
    return [test for test in tests if test.examples]


def test_everything_that_does_something_has_an_example() -> None:
    assert {test.name for test in examples()} >= {"dyexport", "build", "evaluate", "sample", "verify"}


@pytest.mark.parametrize("test", examples(), ids=lambda test: test.name)
def test_examples_run(test: doctest.DocTest, inside: Path) -> None:
    test.globs["dyexport"] = dyexport
    failures, tried = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
    assert tried
    assert not failures


def test_a_build_reports_its_progress_and_keeps_its_stages(tmp_path: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    asked = {"random_weights": True, "engines": 1, "baseline": False, "out": tmp_path / "b", "work": tmp_path / "w"}
    bundle = dyexport.build("sit-tiny", budget=0.5, progress=lambda *report: reports.append(report), **asked)
    assert {"calibrate", "weights", "onnx segment-00"} <= {stage for stage, _, _ in reports}
    assert (tmp_path / "w" / "settings.json").is_file()
    assert dyexport.BuildSettings.load(tmp_path / "w").engines == 1
    reports.clear()
    again = dyexport.build("sit-tiny", budget=0.5, progress=lambda *report: reports.append(report), **asked)
    assert again.manifest == bundle.manifest
    assert reports == []


def test_a_build_warns_of_a_bundle_that_it_replaces(tmp_path: Path) -> None:
    asked = {"random_weights": True, "baseline": False, "out": tmp_path / "b"}
    dyexport.build("sit-tiny", budget=0.5, engines=1, **asked)
    with pytest.warns(UserWarning, match="replaced the bundle in .*, which had engines 1; to keep both") as caught:
        dyexport.build("sit-tiny", budget=0.5, engines=2, **asked)
    assert [warning.filename for warning in caught if "replaced" in str(warning.message)] == [__file__]


def test_the_recipe_of_a_build_is_what_it_does(tmp_path: Path) -> None:
    places = {"out": tmp_path / "b", "work": tmp_path / "w", "budget": 0.5}
    large = dyexport.BuildSettings(model="flux", **places).effective_recipe()
    assert (large["finetune"]["steps"], large["td_lora"]["rank"], large["data"]) == (10_000, 16, "synthetic")
    assert (large["precision"], large["needs_gpu"]) == ("bf16", True)
    untrained = dyexport.BuildSettings(model="flux", finetune_steps=0, precision="fp32", **places).effective_recipe()
    assert (untrained["finetune"], untrained["td_lora"], untrained["data"]) == (None, None, None)
    assert (untrained["precision"], untrained["calibration_precision"]) == ("fp32", "fp32")


def test_settings_that_do_not_exist_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown setting 'engine'; did you mean 'engines'"):
        dyexport.build("sit-digits", budget=0.5, out=tmp_path / "b", engine=2)
    with pytest.raises(UsageError, match="no model is named"):
        dyexport.build(budget=0.5, out=tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_differs_fails(folder: Path) -> None:
    report = dyexport.verify(Bundle.open(folder / "sit-digits-0.5"), timesteps=2, tolerance=1e-12)
    assert not report.passed
    assert repr(report).startswith("VerifyReport(failed: error ")
