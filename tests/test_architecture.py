"""Imports go one way, the build side and the run side meet only in the bundle, and names stay unambiguous."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import dyexport

ROOT = Path(__file__).parents[1]
LINKED = ("calibration", "engines", "exporters")

CONTRACTS = {
    "arguments",
    "errors",
    "files",
    "digests",
    "sizes",
    "tables",
    "tensors",
    "architectures",
    "presets",
    "lora",
    "manifest",
    "bundle",
    "graphs",
    "plans",
    "tensorrt_api",
}
BUILD_SIDE = {"models", "slicing", "calibration", "exporters", "training"}
RUN_SIDE = {"engines", "runtime", "serving", "bench"}
EITHER_SIDE = CONTRACTS | BUILD_SIDE | RUN_SIDE

# What each unit of the package (a module or folder right below dyexport/) may import.
MAY_IMPORT: dict[str, set[str]] = {
    "arguments": {"errors"},
    "errors": set(),
    "files": {"errors"},
    "digests": {"files"},
    "sizes": {"arguments", "errors"},
    "tables": {"errors"},
    "tensors": set(),
    "architectures": set(),
    "presets": {"errors", "architectures"},
    "lora": {"arguments", "errors"},
    "manifest": {"errors", "lora", "tables"},
    "bundle": {"errors", "digests", "manifest", "tables"},
    "graphs": {"manifest"},
    "plans": {"errors", "tensors"},
    "tensorrt_api": {"errors", "plans"},
    "models": CONTRACTS,
    "slicing": CONTRACTS | {"models"},
    "calibration": CONTRACTS | {"models", "slicing"},
    "exporters": CONTRACTS | {"models", "slicing"},
    "training": CONTRACTS | {"models", "slicing"},
    "engines": {"errors", "files", "tables", "tensors", "manifest", "bundle", "graphs", "plans", "tensorrt_api"},
    "runtime": {"arguments", "errors", "files", "sizes", "tables", "manifest", "bundle", "engines"},
    "serving": {"arguments", "errors", "files", "sizes", "tables", "manifest", "bundle", "engines", "runtime"},
    "bench": {"arguments", "errors", "sizes", "files", "tables", "manifest", "bundle", "plans", "engines", "runtime"},
    "build": EITHER_SIDE,
    "demo": EITHER_SIDE | {"build"},
    "progress": set(),
    "console": {"errors", "progress"},
    "commands": EITHER_SIDE | {"build", "demo", "console"},
    "cli": {"errors", "console", "commands"},
    "__main__": {"cli"},
    "__init__": {"errors", "bundle", "runtime"},
}

Import = tuple[int, str]  # line, dotted name


def package_files() -> list[Path]:
    """Every Python file of the package; the linked folders are named because globbing does not enter links."""
    folders = [ROOT / "dyexport", *(ROOT / "dyexport" / name for name in LINKED)]
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def unit_of(path: Path) -> str:
    return path.relative_to(ROOT / "dyexport").parts[0].removesuffix(".py")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def run_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below ``node`` that run; what only a type checker reads does not."""
    children: Iterator[ast.AST] | list[ast.stmt]
    children = node.orelse if isinstance(node, ast.If) and is_type_checking(node) else ast.iter_child_nodes(node)
    for child in children:
        yield child
        yield from run_nodes(child)


def imports_of(source: str) -> Iterator[Import]:
    """Dotted names a module imports, at any depth, also those it keeps as strings to import later."""
    for node in run_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"dyexport\.\w+[\w.:]*", str(node.value)):
            yield node.lineno, str(node.value)


def imported_units(source: str) -> Iterator[tuple[int, str]]:
    for line, name in imports_of(source):
        root, _, rest = name.partition(".")
        unit = re.split(r"[.:]", rest)[0]
        if root == "dyexport" and unit != "__version__":
            yield line, unit if unit in MAY_IMPORT else "__init__"


def violations(unit: str, source: str) -> list[str]:
    allowed = MAY_IMPORT[unit] | {unit}
    return [f"line {line}: {unit} imports {other}" for line, other in imported_units(source) if other not in allowed]


@pytest.mark.parametrize("path", package_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    unit = unit_of(path)
    assert unit in MAY_IMPORT, f"say in MAY_IMPORT what dyexport.{unit} may import"
    assert violations(unit, path.read_text()) == []


def test_every_package_file_is_looked_at() -> None:
    units = {unit_of(path) for path in package_files()}
    assert units >= CONTRACTS | BUILD_SIDE | RUN_SIDE


def test_neither_side_knows_the_other() -> None:
    for unit in RUN_SIDE:
        assert not MAY_IMPORT[unit] & BUILD_SIDE
    for unit in BUILD_SIDE:
        assert not MAY_IMPORT[unit] & RUN_SIDE
    for unit in LINKED:
        assert not MAY_IMPORT[unit] & (set(LINKED) - {unit})


@pytest.mark.parametrize(
    "statement",
    [
        "from dyexport.models import dit",
        "import dyexport.models.dit",
        "from dyexport import models",
        "def f():\n    from dyexport.slicing.flops import Cost",
        "import_module(f'dyexport.exporters.{name}')",
        "ENGINES = {'ort': 'dyexport.calibration.widths:solve'}",
        "if TYPE_CHECKING:\n    import torch\nelse:\n    import dyexport.training",
        "from dyexport import load",
    ],
)
def test_a_way_back_is_found(statement: str) -> None:
    assert violations("engines", statement)


@pytest.mark.parametrize(
    "statement",
    [
        "from dyexport.bundle import Bundle",
        "from dyexport.engines.base import Engine",
        "from dyexport import __version__",
        "if TYPE_CHECKING:\n    from dyexport.models.dit import Adapter",
        "'dyexport.models is not imported here'",
    ],
)
def test_the_right_way_is_allowed(statement: str) -> None:
    assert violations("engines", statement) == []


def test_no_file_shadows_a_library() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    libraries = {re.split(r"[^\w-]", requirement)[0].replace("-", "_") for requirement in declared}
    for path in package_files():
        libraries |= {name.split(".")[0] for _, name in imports_of(path.read_text())}
    libraries -= sys.stdlib_module_names
    ours = {path.stem if path.stem != "__init__" else path.parent.name for path in package_files()}
    assert ours & libraries == {"dyexport"}


@pytest.mark.parametrize("name", LINKED)
def test_links_are_relative(name: str) -> None:
    link = ROOT / "dyexport" / name
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{name}"


@pytest.mark.parametrize(
    "statement",
    [
        "import dyexport",
        "import dyexport; dyexport.Bundle",
        "import dyexport.bundle, dyexport.presets, dyexport.tables",
        "import dyexport.cli",
        "import dyexport.cli, sys, contextlib; sys.argv = ['dyexport', '--help']\n"
        "with contextlib.suppress(SystemExit): dyexport.cli.main()",
    ],
)
def test_torch_is_not_imported_before_it_is_needed(statement: str) -> None:
    check = "import sys; assert 'torch' not in sys.modules, 'imported torch'"
    done = subprocess.run([sys.executable, "-c", f"{statement}\n{check}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_resolve() -> None:
    for name in dyexport.__all__:
        assert getattr(dyexport, name) is not None
    assert set(dyexport.__all__) <= set(dir(dyexport))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        dyexport.__getattr__("nonsense")


@pytest.mark.parametrize("folder", LINKED)
def test_linter_refuses_the_folder_as_a_root(folder: str, tmp_path: Path) -> None:
    source = tmp_path / "outsider.py"
    source.write_text(f"from {folder}.base import x\nimport {folder}\n")
    command = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "--select", "TID251"]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.stdout.count(f"`{folder}") >= 2, done.stdout
