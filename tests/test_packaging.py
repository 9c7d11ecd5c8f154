"""The wheel holds every package once, under one import root, however it was built."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

import dyexport

ROOT = Path(__file__).parents[1]
LINKED = ("calibration", "engines", "exporters")


def repository_files(root: Path) -> list[Path]:
    """Files that are committed or about to be, relative to the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    names = [Path(name) for name in listed.split("\0") if name]
    return [name for name in names if (root / name).is_symlink() or (root / name).exists()]


def module_name(path: Path) -> Path:
    """Where a file of the repository stands in the wheel."""
    return Path("dyexport", path) if path.parts[0] in LINKED else path


def expected_modules() -> set[str]:
    files = [path for path in repository_files(ROOT) if path.parts[0] in ("dyexport", *LINKED)]
    return {str(module_name(path)) for path in files if path.suffix == ".py"}


def packages(names: set[str]) -> set[str]:
    return {str(Path(name).parent).replace("/", ".") for name in names if name.endswith("/__init__.py")}


def copy_checkout(copy: Path, *, links: bool) -> None:
    for name in repository_files(ROOT):
        if links or not (ROOT / name).is_symlink():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)


SLOW_WAYS = ("wheel by way of an sdist", "wheel where links are not supported")


@pytest.fixture(scope="module", params=["wheel", *(pytest.param(way, marks=pytest.mark.slow) for way in SLOW_WAYS)])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in a wheel, built from a copy of the checkout."""
    copy, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    copy_checkout(copy, links="links" not in request.param)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out)]
    command += [] if "sdist" in request.param else ["--wheel"]
    done = subprocess.run([*command, str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return zipfile.ZipFile(built).namelist()


def test_wheel_holds_every_module_once(wheel: list[str]) -> None:
    modules = [name for name in wheel if name.endswith(".py")]
    assert len(wheel) == len(set(wheel))
    assert set(modules) == expected_modules()


def test_wheel_has_one_import_root(wheel: list[str]) -> None:
    roots = {name.split("/")[0] for name in wheel}
    assert roots == {"dyexport", f"dyexport-{dyexport.__version__}.dist-info"}


def test_wheel_holds_the_template_of_the_report(wheel: list[str]) -> None:
    assert {f"dyexport/report/templates/report.{suffix}" for suffix in ("html.j2", "css")} <= set(wheel)


def test_wheel_is_typed_licensed_and_has_a_command(wheel: list[str]) -> None:
    info = f"dyexport-{dyexport.__version__}.dist-info"
    assert {"dyexport/py.typed", f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"} <= set(wheel)


def test_pyproject_lists_every_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(packages(expected_modules()))


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {str(Path(name).parent).replace("/", ".") for name in expected_modules()}
    assert folders == packages(expected_modules())


def test_every_test_is_run(request: pytest.FixtureRequest) -> None:
    """pytest passes over folders by name: its own list holds ``build``, and so held all of tests/pipeline."""
    passed_over = request.config.getini("norecursedirs")
    tests = ROOT / "tests"
    files = [path.relative_to(ROOT) for path in tests.rglob("test_*.py")]
    assert Path("tests/pipeline/test_pipeline.py") in files
    assert [str(file) for file in files if any(fnmatch(part, bad) for part in file.parts for bad in passed_over)] == []
