"""Reads ``torch.export`` archives as data.

``torch.export.load`` (torch 2.11 to 2.13) is not safe by itself. It unpickles weights and constants
marked ``use_pickle``, custom objects, and sample inputs that ``weights_only=True`` refuses; it loads
compiled libraries; it resolves operators by attribute, so a node may call any function below
``torch``; and it hands symbolic expressions to sympy, which evaluates them. An archive is therefore
read by ``load_program`` only, which refuses whatever could reach one of these.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from threading import Lock
from typing import TYPE_CHECKING, Any

from dyexport.errors import EngineBuildError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

RECORDS = re.compile(
    r"models/model\.json|data/weights/(weight_\d+|model_weights_config\.json)|data/sample_inputs/model\.pt"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|extra/engine\.json"
    r"|archive_format|archive_version|byteorder|\.data/(version|serialization_id)"
)
OPERATORS = re.compile(
    r"torch\.ops\.aten\.(?!from_file\b)\w+\.\w+|torch\.sym_\w+|math\.(ceil|floor|trunc|sqrt)"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_|or_|getitem)"
)
QUOTED = re.compile(r"(?<=Symbol\()'[su]\d+'|(?<=Float\()'[-+.e\d]+'")
WORD = re.compile(
    r"[su]\d+|\d+|Symbol|Integer|Float|Rational|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|IntTrueDiv"
    r"|FloatTrueDiv|ModularIndexing|Where|CeilToInt|FloorToInt|RoundToInt|TruncToInt|TruncToFloat|ToFloat"
    r"|And|Or|Not|Equality|Unequality|(Strict)?(Less|Greater)Than|Eq|Ne|L[te]|G[te]|positive|integer|precision|nonnegative|True|False"
)


LOADING = Lock()  # torch's deserialiser is a global, and engines are also activated in the background


def read_extra(path: Path, name: str) -> bytes:
    """A file that was stored with the program."""
    with _opened(path) as archive:
        return _record(archive, path, f"extra/{name}")


def load_program(path: Path) -> ExportedProgram:
    """The exported program. Raises ``EngineBuildError`` for an archive that is not plain data."""
    import torch

    with _opened(path) as archive:
        _check_records(archive, path)
        _check_pickles(archive, path)
        _check_graph(json.loads(_record(archive, path, "models/model.json")), path)
    try:
        with LOADING:
            return torch.export.load(path)
    except Exception as error:  # whatever its deserialiser trips over
        raise EngineBuildError(f"torch cannot load {path}: {error}") from error


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise EngineBuildError(f"cannot read {path}: {error}") from error


def _names(archive: zipfile.ZipFile) -> dict[str, str]:
    """Full name by the name below the archive's single root folder."""
    return {name.partition("/")[2]: name for name in archive.namelist()}


def _record(archive: zipfile.ZipFile, path: Path, name: str) -> bytes:
    names = _names(archive)
    if name not in names:
        raise EngineBuildError(f"{path} lacks {name}; export the bundle again")
    return archive.read(names[name])


def _check_records(archive: zipfile.ZipFile, path: Path) -> None:
    names = archive.namelist()
    roots = {name.partition("/")[0] for name in names}
    if len(roots) != 1 or len(set(names)) != len(names):
        raise EngineBuildError(f"{path} is not a torch.export archive")
    for name in _names(archive):
        if not RECORDS.fullmatch(name):
            raise EngineBuildError(f"{path} holds {name}, which is not plain data; it is not loaded")


def _check_pickles(archive: zipfile.ZipFile, path: Path) -> None:
    import torch

    for name in ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json"):
        for weight, entry in json.loads(_record(archive, path, name))["config"].items():
            if entry["use_pickle"] is not False or not re.fullmatch(r"(weight|tensor)_\d+", entry["path_name"]):
                raise EngineBuildError(f"{path}: {weight} is pickled; it is not loaded")
    try:
        torch.load(io.BytesIO(_record(archive, path, "data/sample_inputs/model.pt")), weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise EngineBuildError(f"{path}: its sample inputs are not tensors; it is not loaded") from error


def _check_graph(program: Any, path: Path) -> None:
    for key, value in _strings(program):
        if key == "target" and not OPERATORS.fullmatch(value):
            raise EngineBuildError(f"{path} calls {value}, which is not a tensor operator; it is not loaded")
        if key == "expr_str" and not is_arithmetic(value):
            raise EngineBuildError(f"{path} has the expression {value!r}, which is not arithmetic; it is not loaded")


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string of a JSON value with the key it stands under."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _strings(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, key)


def is_arithmetic(expression: str) -> bool:
    """Whether sympy can evaluate an expression without being led to anything but arithmetic."""
    bare = QUOTED.sub("", expression)
    plain = re.fullmatch(r"[\w\s,()=+*/<>-]*", bare) is not None
    return plain and all(WORD.fullmatch(word) for word in re.findall(r"\w+", bare))
