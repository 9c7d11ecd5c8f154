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
from dyexport.backbones import BACKBONES, part
from dyexport.errors import EXTRAS

ROOT = Path(__file__).parents[1]
LINKED = ("calibration", "engines", "exporters")

CONTRACTS = {
    "arguments",
    "backbones",
    "backbones.engine_sizes",
    "backbones.preset",
    "backbones.stored_config",
    "bundle",
    "digests",
    "digits",
    "emoji",
    "errors",
    "files",
    "flops",
    "lora",
    "noise_schedule",
    "presets",
    "progress",
    "stages",
    "tensorrt_api",
}
BUILD_ROLES = {"backbones.basic_transformer_block", "backbones.conditions", "backbones.cut", "backbones.flops"} | {
    f"backbones.{role}" for role in ("latents", "masked", "published", "slim", "slim_conditioning", "slim_layers")
}
RUN_ROLES = {"backbones.pipeline", "backbones.stand_in"}
BUILD_SIDE = {"models", "checkpoints", "slicing", "calibration", "exporters", "training", "encoding"} | BUILD_ROLES
RUN_SIDE = {"engines", "runtime", "serving", "bench", "evaluation", "report"} | RUN_ROLES
EITHER_SIDE = CONTRACTS | BUILD_SIDE | RUN_SIDE
PIPELINE = {"pipeline", "verification"}
FROM_BUNDLES = {"compilation"}

# What each unit of the package may import: a module or folder right below dyexport/, and of a backbone each role.
MAY_IMPORT: dict[str, set[str]] = {
    "arguments": {"errors"},
    "errors": set(),
    "files": {"errors"},
    "digests": {"files"},
    "digits": {"errors"},
    "emoji": {"digits", "emoji_packages", "errors", "files"},
    "emoji_packages": {"errors"},
    "backbones": {"backbones.preset", "bundle", "errors", "lora", "noise_schedule"},
    "backbones.stored_config": {"errors"},
    "backbones.preset": {"backbones", "backbones.stored_config"},
    "backbones.engine_sizes": {"bundle"},
    "noise_schedule": {"backbones", "errors"},
    "flops": {"backbones", "backbones.flops", "lora"},
    "pictures": {"errors"},
    "presets": {"errors", "backbones", "backbones.preset"},
    "lora": {"arguments", "errors"},
    "bundle": {"errors", "digests", "lora"},
    "stages": {"errors", "files", "digests", "bundle", "progress"},
    "tensorrt_api": {"errors", "bundle"},
    "models": CONTRACTS | BUILD_ROLES,
    "checkpoints": CONTRACTS | BUILD_ROLES | {"models"},
    "slicing": CONTRACTS | BUILD_ROLES | {"models"},
    "calibration": CONTRACTS | BUILD_ROLES | {"models", "slicing"},
    "exporters": CONTRACTS | {"models", "slicing"},
    "training": CONTRACTS | BUILD_ROLES | {"models", "slicing"},
    "encoding": CONTRACTS | BUILD_ROLES | {"checkpoints", "models", "pictures", "training"},
    "engines": {"errors", "files", "bundle", "tensorrt_api"},
    "runtime": {"arguments", "errors", "files", "bundle", "engines", "progress", "backbones", "backbones.preset"}
    | RUN_ROLES,
    "serving": {"arguments", "errors", "files", "bundle", "engines", "noise_schedule", "progress", "runtime"}
    | {"backbones", "backbones.preset"}
    | RUN_ROLES,
    "bench": {
        "arguments",
        "digits",
        "emoji",
        "errors",
        "files",
        "bundle",
        "engines",
        "progress",
        "runtime",
        "backbones",
        "backbones.engine_sizes",
        "backbones.preset",
    },
    "report": {
        "arguments",
        "backbones",
        "backbones.pipeline",
        "backbones.preset",
        "bench",
        "bundle",
        "engines",
        "errors",
        "evaluation",
        "files",
        "flops",
        "noise_schedule",
        "progress",
        "runtime",
        "samples",
    },
    "evaluation": {"arguments", "digits", "emoji", "errors", "files", "bundle", "engines", "noise_schedule", "progress"}
    | {"backbones", "backbones.pipeline", "backbones.preset", "bench", "pictures", "runtime"},
    "doctor": {"errors", "bundle", "engines", "runtime", "tensorrt_api"},
    **{role: CONTRACTS | BUILD_ROLES | {"models", "slicing"} for role in BUILD_ROLES},
    **{role: {"errors", "bundle", "runtime", "backbones", "backbones.preset"} for role in RUN_ROLES},
    "compilation": CONTRACTS | {"engines", "exporters", "slicing"},
    "pipeline": EITHER_SIDE | FROM_BUNDLES,
    "verification": EITHER_SIDE | FROM_BUNDLES | {"pipeline"},
    "demo": EITHER_SIDE | PIPELINE,
    "samples": {"arguments", "errors", "progress", "bundle", "runtime", "bench", "noise_schedule"}
    | {"backbones", "backbones.preset", "backbones.pipeline"},
    "evaluating": {"bench", "bundle", "evaluation", "progress", "runtime", "verification"},
    "progress": set(),
    "console": {"errors", "progress"},
    "commands": EITHER_SIDE
    | PIPELINE
    | FROM_BUNDLES
    | {"demo", "doctor", "evaluating", "samples", "console", "progress"},
    "cli": {"errors", "console", "commands"},
    "__main__": {"cli"},
    "__init__": {
        "backbones",
        "backbones.stand_in",
        "bundle",
        "compilation",
        "engines",
        "errors",
        "evaluating",
        "evaluation",
        "exporters",
        "lora",
        "pipeline",
        "runtime",
        "samples",
        "training",
        "verification",
    },
}
REGISTRY = {
    "get_adapter": "backbones.masked",
    "get_conditioning": "backbones.conditions",
    "get_latent_format": "backbones.latents",
    "get_slicer": "backbones.cut",
    "get_stand_in": "backbones.stand_in",
    "get_pipeline": "backbones.pipeline",
    "get_engine_sizes": "backbones.engine_sizes",
    "known_preset": "backbones.preset",
    "sampling_defaults": "backbones.preset",
}
"""Functions of ``dyexport.backbones`` that import a role."""

Import = tuple[int, str]  # line, dotted name


def package_files() -> list[Path]:
    """Every Python file of the package; the linked folders are named because globbing does not enter links."""
    folders = [ROOT / "dyexport", *(ROOT / "dyexport" / name for name in LINKED)]
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


SHARED = ("autoencoders", "base", "calibration_effort", "dialect", "recipe", "sampling")
"""Modules that all backbones share."""


def unit_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "dyexport").with_suffix("").parts
    if parts[0] != "backbones":
        return parts[0]
    return "backbones" if parts[-1] in ("__init__", *SHARED) else f"backbones.{parts[-1]}"


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
        parts = re.split(r"[.:]", name)
        if parts[0] != "dyexport" or parts[1:2] == ["__version__"]:
            continue
        if parts[1:2] == ["backbones"]:
            yield line, imported_role(parts[2:])
        else:
            yield line, parts[1] if parts[1:] and parts[1] in MAY_IMPORT else "__init__"


def imported_role(parts: list[str]) -> str:
    """The unit of what is imported from ``dyexport.backbones``: a role of a backbone, or a contract."""
    if not parts or parts[0] in SHARED:
        return "backbones"
    role = next((f"backbones.{part}" for part in parts if f"backbones.{part}" in MAY_IMPORT), "backbones")
    return REGISTRY.get(parts[0], role)


def violations(unit: str, source: str) -> list[str]:
    allowed = MAY_IMPORT[unit] | {unit}
    return [f"line {line}: {unit} imports {other}" for line, other in imported_units(source) if other not in allowed]


@pytest.mark.parametrize("path", package_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    unit = unit_of(path)
    assert unit in MAY_IMPORT, f"say in MAY_IMPORT what dyexport.{unit} may import"
    assert violations(unit, path.read_text()) == []


RUN_EXTRAS = {
    "bench",
    "cpu",
    "demo",
    "eval",
    "gguf",
    "prompts",
    "report",
    "rtx",
    "tensorrt",
    "torch-tensorrt",
    "triton",
    "video",
}
DISTRIBUTIONS = {
    "PIL": "pillow",
    "google": "protobuf",
    "imageio_ffmpeg": "imageio-ffmpeg",
    "pynvml": "nvidia-ml-py",
    "onnxruntime_ep_nv_tensorrt_rtx": "onnxruntime-ep-nv-tensorrt-rtx-cu13",
    "sklearn": "scikit-learn",
    "tensorrt_rtx": "tensorrt-rtx-cu13-bindings",
    "tensorrt_rtx_bindings": "tensorrt-rtx-cu13-bindings",
}
"""Names on the package index, of modules that are called otherwise."""
UNDECLARED = {"triton_python_backend_utils"}  # comes with a Triton server


def declared(*extras: str) -> set[str]:
    """Distributions that the package, or these extras, require; what comes along with those is not declared."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["optional-dependencies"][extra] for extra in extras] or [project["dependencies"]]
    return {re.split(r"[^\w-]", requirement)[0] for listed in lists for requirement in listed}


def third_party(source: str, *, at_once: bool) -> set[str]:
    """Distributions that a module imports, or only those that it imports as it is imported."""
    tree = ast.parse(source)
    nodes = [node for node in run_nodes(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    if at_once:
        functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
        inner = {
            id(node) for function in ast.walk(tree) if isinstance(function, functions) for node in ast.walk(function)
        }
        nodes = [node for node in nodes if id(node) not in inner]
    names = {name.split(".")[0] for node in nodes for _, name in imports_of(ast.unparse(node))}
    names -= {*sys.stdlib_module_names, "dyexport", *UNDECLARED}
    return {DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in names}


@pytest.mark.parametrize("path", package_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_imported_is_declared(path: Path) -> None:
    """Without an extra every module of the run side can be imported; functions may import what an extra installs."""
    builds = unit_of(path) in BUILD_SIDE | PIPELINE | {"demo"}
    source = path.read_text()
    assert third_party(source, at_once=True) <= declared() | (declared("build") if builds else set())
    assert third_party(source, at_once=False) <= declared() | declared(
        *RUN_EXTRAS, *(("build", "low-memory", "parquet") if builds else ())
    )


@pytest.mark.parametrize(
    ("source", "at_once", "anywhere"),
    [
        ("import psutil", {"psutil"}, {"psutil"}),
        ("def f():\n    from google.protobuf import message", set(), {"protobuf"}),
        ("class A:\n    import onnx_ir as ir", {"onnx-ir"}, {"onnx-ir"}),
        ("if TYPE_CHECKING:\n    import peft", set(), set()),
        ("try:\n    import sklearn.svm\nexcept ImportError:\n    pass", {"scikit-learn"}, {"scikit-learn"}),
    ],
)
def test_imports_are_seen(source: str, at_once: set[str], anywhere: set[str]) -> None:
    assert third_party(source, at_once=True) == at_once
    assert third_party(source, at_once=False) == anywhere


def test_an_absent_library_names_an_extra_that_has_it() -> None:
    for module, extra in EXTRAS.items():
        assert module.replace("_", "-") in declared(extra)
    assert {module.replace("_", "-") for module, extra in EXTRAS.items() if extra == "build"} | {
        "transformers"
    } == declared("build")


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
        "from dyexport.models import gates",
        "import dyexport.backbones.dit.masked",
        "from dyexport import models",
        "def f():\n    from dyexport.flops import Cost",
        "import_module(f'dyexport.exporters.{name}')",
        "ENGINES = {'ort': 'dyexport.calibration.widths:solve'}",
        "if TYPE_CHECKING:\n    import torch\nelse:\n    import dyexport.training",
        "from dyexport import load",
        "from dyexport.backbones import get_adapter",
        "from dyexport.backbones.flux.masked import FluxAdapter",
    ],
)
def test_a_way_back_is_found(statement: str) -> None:
    assert violations("engines", statement)


@pytest.mark.parametrize(
    "statement",
    [
        "from dyexport.bundle.reader import Bundle",
        "from dyexport.engines.base import Engine",
        "from dyexport import __version__",
        "if TYPE_CHECKING:\n    from dyexport.backbones.dit.masked import Adapter",
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


NAMES = "|".join({name.split("_")[0] for name in BACKBONES})
BACKBONE_NAME = re.compile(rf"(?<![a-z])(?:{NAMES})(?![a-z])", re.IGNORECASE)
CLASS_NAME = re.compile(rf"(?:{NAMES.title()}|DiT|SiT)(?=[A-Z])")
PAPER_OR_USAGE = re.compile(r"arXiv|--model [\w-]+|\bdyexport [a-z]+ |>>> ")
MAY_NAME_A_MODEL = {
    "demo.py": ("sit-digits",),  # the demo's model
    "flops.py": ("DiT table 1",),  # of the paper
    "pipeline/api.py": ("Bundle(",),  # what its example prints
}
"""Files outside ``backbones`` that name a model, and the names."""


def names_of_backbones(source: str) -> list[tuple[int, str]]:
    """Lines that name a backbone or one of its classes, other than as a paper's subject or in a usage example."""
    return [
        (number, line.strip())
        for number, line in enumerate(source.splitlines(), start=1)
        if (BACKBONE_NAME.search(line) or CLASS_NAME.search(line)) and not PAPER_OR_USAGE.search(line)
    ]


@pytest.mark.parametrize(
    "path",
    [path for path in package_files() if not unit_of(path).startswith("backbones")],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_a_backbone_is_named_in_its_folder_alone(path: Path) -> None:
    allowed = MAY_NAME_A_MODEL.get(str(path.relative_to(ROOT / "dyexport")), ())
    assert [
        found for found in names_of_backbones(path.read_text()) if not any(name in found[1] for name in allowed)
    ] == []


@pytest.mark.parametrize(
    "line",
    [
        'if spec.backbone == "flux":',
        "from diffusers import LattePipeline",
        "# DiT, SiT: labels",
        "FLUX_STEPS = 28",
        "isinstance(preset, FluxPreset)",
    ],
)
def test_a_name_of_a_backbone_is_found(line: str) -> None:
    assert names_of_backbones(line)


@pytest.mark.parametrize(
    "line", ["x.flatten(1)", "the latter", "edit", "DiT (arXiv 2212.09748)", "dyexport build --model flux"]
)
def test_other_words_are_allowed(line: str) -> None:
    assert names_of_backbones(line) == []


ROLES = {
    "preset": ("PRESETS",),
    "latents": ("latent_format",),
    "masked": ("ADAPTER",),
    "published": ("DIALECTS", "LORA_LOADER"),
    "conditions": ("Conditioning",),
    "cut": ("slice_network", "slice_conditioning", "tables"),
    "slim": (),
    "flops": ("count",),
    "engine_sizes": ("free_sizes", "sorts_text"),
    "stand_in": ("StandIn",),
    "pipeline": ("PIPELINE",),
}
"""What each module of a backbone's folder defines."""


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_defines_every_role(backbone: str, role: str) -> None:
    module = part(backbone, role)
    assert [name for name in ROLES[role] if not hasattr(module, name)] == []


def test_roles_are_those_of_the_table() -> None:
    import dyexport.backbones.base as contracts

    rows = re.findall(r"^\| (``.*?)\|", contracts.__doc__ or "", re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"``(\w+)``", row)} == set(ROLES)


@pytest.mark.parametrize("name", LINKED)
def test_links_are_relative(name: str) -> None:
    link = ROOT / "dyexport" / name
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{name}"


@pytest.mark.parametrize(
    "statement",
    [
        "import dyexport",
        "import dyexport; dyexport.Bundle; dyexport.BuildSettings",
        "import dyexport.bundle.reader, dyexport.presets, dyexport.bundle.tables",
        "import dyexport.pipeline.settings",
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
    assert {name for name in dir(dyexport) if not name.startswith("__")} | {"__version__"} == set(dyexport.__all__)


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
