"""Files of weights in a diffusers directory: find, write and link them."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from dyexport.errors import CheckpointError

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SHARD_NAME = re.compile(r"-\d+-of-\d+\.")
BINARY = "diffusion_pytorch_model.bin"
SHARD = 2 << 30  # bytes
NAMED = 3  # number of tensors that an error names


def write_weights(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors to a safetensors file. Tensors that share memory are written once per name, as in diffusers."""
    addresses: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        separate[name] = tensor.clone() if tensor.data_ptr() in addresses else tensor.detach().contiguous()
        addresses.add(tensor.data_ptr())
    save_file(separate, file)


def write_shards(weights: Mapping[str, Tensor], directory: Path, shard_bytes: int = SHARD) -> None:
    """Write the weights of a diffusers directory, with one shard in memory at a time."""
    files: dict[str, str] = {}  # file of each tensor
    shard: dict[str, Tensor] = {}
    for name in weights:
        shard[name] = weights[name]
        if len(files) + len(shard) == len(weights) or sum(tensor.nbytes for tensor in shard.values()) >= shard_bytes:
            whole = len(shard) == len(weights)
            file = WEIGHTS if whole else WEIGHTS.replace(".", f"-{len(set(files.values())) + 1:05}.")
            write_weights(shard, directory / file)
            files |= dict.fromkeys(shard, file)
            shard = {}
    if set(files.values()) != {WEIGHTS}:
        index = {"metadata": {}, "weight_map": files}
        (directory / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def link_weights(source: Path, directory: Path) -> None:
    """Link the weights of ``source``, a diffusers directory or a single file, into ``directory``."""
    weights = find_weights(source) if source.is_dir() else source
    if not _is_index(weights):
        link(weights, directory / WEIGHTS)
        return
    shutil.copyfile(weights, directory / INDEX)
    for shard in _shards(weights):
        link(shard, directory / shard.name)


def link(file: Path, target: Path) -> None:
    """Make ``target`` a symbolic link to ``file``, relative within a work directory, so that both can be moved."""
    siblings = file.absolute().parent.parent == target.absolute().parent.parent
    target.symlink_to(os.path.relpath(file, target.parent) if siblings else file.resolve())


def weight_files(directory: Path) -> list[Path]:
    """Return the files that hold the weights of a diffusers directory. Raises ``CheckpointError``."""
    weights = find_weights(directory)
    return _shards(weights) if _is_index(weights) else [weights]


def find_weights(directory: Path) -> Path:
    """Find the file of weights in a diffusers directory, or the index of its shards.

    A variant such as ``fp16`` counts where it is the only one. Raises ``CheckpointError``.
    """
    for name in (INDEX, WEIGHTS, f"{BINARY}.index.json", BINARY):
        if (directory / name).is_file():
            return directory / name
    indices = [path for path in directory.glob(f"{WEIGHTS}.index.*.json") if path.is_file()]
    files = [path for path in directory.glob("diffusion_pytorch_model.*.safetensors") if path.is_file()]
    variants = sorted([*indices, *(file for file in files if not SHARD_NAME.search(file.name))])
    if len(variants) != 1:
        names = listed(file.name for file in variants)
        content = f"several variants, {names}: pass one" if variants else "no weights"
        raise CheckpointError(f"{directory} holds {content}; {WEIGHTS} or {INDEX} is expected there")
    return variants[0]


def _is_index(file: Path) -> bool:
    return file.suffix == ".json"


def _shards(index: Path) -> list[Path]:
    """Return the files that an index names, which must lie next to it. Raises ``CheckpointError``."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        shards = [index.with_name(name) for name in names]  # refuses names with a folder in them
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{index} is not an index of shards: {repr(error)[:200]}; download the checkpoint again"
        ) from error
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(f"{index} names {listed(missing)}, not to be found there; download the missing shards")
    return shards


def check_readable(file: Path) -> None:
    """Raise ``CheckpointError`` for a file that cannot be opened; safetensors and torch report it as damaged."""
    try:
        file.open("rb").close()
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}; make it readable, or give another") from error


def listed(names: Iterable[str]) -> str:
    """Return the first few names as text, with the number of the others."""
    names = list(names)
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + rest
