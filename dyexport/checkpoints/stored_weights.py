"""Tensors as they lie on disk: safetensors, whole or sharded, and PyTorch files, of which nothing is ever run."""

from __future__ import annotations

import json
import os
import re
import shutil
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dyexport.backbones.base import Part
from dyexport.checkpoints.quantized import GGUF, GgufWeights
from dyexport.digests import once, sha256_of
from dyexport.errors import CheckpointError
from dyexport.progress import Progress

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SHARD_NAME = re.compile(r"-\d+-of-\d+\.")
BINARY = "diffusion_pytorch_model.bin"
SAFETENSORS = ".safetensors"
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
WRAPPERS = ("ema", "model", "module")  # where training files keep their weights; the averaged ones are preferred
PREFIXES = ("module.", "model.", "diffusion_model.", "_orig_mod.", "ema_model.")  # of DDP, trainers, ComfyUI, compile
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SHARD = 2 << 30  # bytes
NAMED = 3  # how many of the tensors that do not fit an error names


class StoredWeights(Mapping[str, Tensor]):
    """Tensors on disk, by the names and in the dtypes they are stored in.

    Each is read when it is asked for and kept by nobody here, so a model's size bounds nothing.
    """

    def __init__(self, source: Path) -> None:
        """``source`` is a diffusers directory or a single file; reads names only."""
        self._homes: dict[str, Path] = {}  # of tensors in safetensors
        self._loaded: Mapping[str, Tensor] = {}  # of PyTorch and GGUF files
        for file in weight_files(source) if source.is_dir() else [source]:
            if file.suffix == SAFETENSORS:
                self._homes |= dict.fromkeys(_names(file), file)
            elif file.suffix in PICKLES:
                self._loaded = {**self._loaded, **_unwrap(file, _load_pickle(file))}
            elif file.suffix == GGUF:
                self._loaded = GgufWeights(file)
            else:
                kinds = ", ".join((SAFETENSORS, *PICKLES, GGUF))
                raise CheckpointError(f"{file} is of no known kind; pass a {kinds} or a directory")

    def __getitem__(self, name: str) -> Tensor:
        return self._loaded[name] if name in self._loaded else _tensor(self._homes[name], name)

    def __contains__(self, name: object) -> bool:
        return name in self._homes or name in self._loaded

    def __iter__(self) -> Iterator[str]:
        yield from self._homes
        yield from self._loaded

    def __len__(self) -> int:
        return len(self._homes) + len(self._loaded)

    @property
    def in_safetensors(self) -> bool:
        return not self._loaded


class View(Mapping[str, Tensor]):
    """Tensors under other names: ``places`` says for each in which mapping it is, and under which name there."""

    def __init__(self, places: Mapping[str, tuple[Mapping[str, Tensor], str]]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> Tensor:
        weights, own = self._places[name]
        return weights[own]

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class Rows(Mapping[str, Tensor]):
    """Tensors made of rows of others: ``places`` says for each of which parts of ``weights``. Read lazily."""

    def __init__(self, weights: Mapping[str, Tensor], places: Mapping[str, tuple[Part, ...]]) -> None:
        self._weights, self._places = weights, places

    def __getitem__(self, name: str) -> Tensor:
        parts = [self._rows(part) for part in self._places[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _rows(self, part: Part) -> Tensor:
        tensor = self._weights[part.name]
        if part.of == 1:
            return tensor
        unit = len(tensor) // part.of
        return tensor[part.start * unit : part.stop * unit]

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def without_prefix(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The same under shorter names, where all begin with the name of something that the model was a part of."""
    names = {name: name for name in weights}  # short -> stored
    while found := next((p for p in PREFIXES if names and all(name.startswith(p) for name in names)), None):
        names = {name.removeprefix(found): own for name, own in names.items()}
    return weights if all(map(str.__eq__, names, names.values())) else View({n: (weights, o) for n, o in names.items()})


def _names(file: Path) -> list[str]:
    with _opened(file) as stored:
        return list(stored.keys())


def _tensor(file: Path, name: str) -> Tensor:
    """Pages of the file, mapped as long as the tensor lives."""
    with _opened(file) as stored:
        tensor: Tensor = stored.get_tensor(name)
    return tensor


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as stored:
            yield stored
    except (OSError, SafetensorError) as error:
        check_readable(file)
        raise CheckpointError(f"{file} is damaged: {error}") from error


def check_readable(file: Path) -> None:
    """Raise ``CheckpointError`` for what the system refuses, which safetensors and torch call missing or damaged."""
    try:
        file.open("rb").close()
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}; make it readable, or give another") from error


def write_weights(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors as they are; one that lies in the memory of another is written out again, as diffusers does."""
    places: set[int] = set()
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own[name] = tensor.clone() if tensor.data_ptr() in places else tensor.detach().contiguous()
        places.add(tensor.data_ptr())
    save_file(own, file)


def write_shards(weights: Mapping[str, Tensor], directory: Path, shard_bytes: int = SHARD) -> None:
    """Write the weights of a diffusers directory, with one shard of them in memory at a time."""
    homes: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    for name in weights:
        shard[name] = weights[name]
        if len(homes) + len(shard) == len(weights) or sum(tensor.nbytes for tensor in shard.values()) >= shard_bytes:
            whole = len(shard) == len(weights)
            file = WEIGHTS if whole else WEIGHTS.replace(".", f"-{len(set(homes.values())) + 1:05}.")
            write_weights(shard, directory / file)
            homes |= dict.fromkeys(shard, file)
            shard = {}
    if set(homes.values()) != {WEIGHTS}:
        index = {"metadata": {}, "weight_map": homes}
        (directory / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def link_weights(source: Path, directory: Path) -> None:
    """Make the weights of ``source``, a diffusers directory or a single file, those of ``directory`` without a copy."""
    found = find_weights(source) if source.is_dir() else source
    if not _is_index(found):
        link(found, directory / WEIGHTS)
        return
    shutil.copyfile(found, directory / INDEX)
    for shard in _shards(found):
        link(shard, directory / shard.name)


def link(file: Path, place: Path) -> None:
    """From one folder of a work directory into another the link is relative, so that both can be moved."""
    near = file.absolute().parent.parent == place.absolute().parent.parent
    place.symlink_to(os.path.relpath(file, place.parent) if near else file.resolve())


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights of a diffusers directory."""
    found = find_weights(directory)
    return _shards(found) if _is_index(found) else [found]


def find_weights(directory: Path) -> Path:
    """The file of weights in a diffusers directory, or the index of its shards; the only variant where there is one."""
    for name in (INDEX, WEIGHTS, f"{BINARY}.index.json", BINARY):
        if (directory / name).is_file():
            return directory / name
    indices = [path for path in directory.glob(f"{WEIGHTS}.index.*.json") if path.is_file()]
    files = [path for path in directory.glob("diffusion_pytorch_model.*.safetensors") if path.is_file()]
    variants = sorted([*indices, *(file for file in files if not SHARD_NAME.search(file.name))])
    if len(variants) != 1:
        found = f"several variants, {listed([file.name for file in variants])}: pass one" if variants else "no weights"
        raise CheckpointError(f"{directory} holds {found}; {WEIGHTS} or {INDEX} is expected there")
    return variants[0]


def _is_index(file: Path) -> bool:
    return file.suffix == ".json"


def _shards(index: Path) -> list[Path]:
    """Return the files that an index names; each must lie next to it."""
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


def _load_pickle(file: Path) -> Any:
    """What a PyTorch file holds, of plain containers, tensors and the record of a training run's arguments."""
    try:
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except Exception as error:  # unpickling errors have no common base
        check_readable(file)
        raise CheckpointError(
            f"{file} is damaged or holds code, which is never run; convert it to safetensors"
        ) from error


def _unwrap(file: Path, content: Any) -> dict[str, Tensor]:
    """The weights of a training file, under one of ``WRAPPERS``, or of a bare state dict."""
    if isinstance(content, Mapping):
        content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{file} holds no weights; pass a state dict, bare or under {', '.join(WRAPPERS)}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout is not torch.strided:
            raise CheckpointError(f"{file}: {name} is not a dense tensor; pass a file of weights alone")
        if value.is_meta:
            raise CheckpointError(f"{file}: {name} is a meta tensor, without values; save the model once it is loaded")
    return dict(content)


def check_weights(
    weights: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    source: Path,
    model: str,
    advance: Progress | None = None,
) -> None:
    """Shapes, names, dtypes and finiteness against ``expected`` (which may be on the meta device).

    ``advance`` gets tensors read, of how many: reading takes minutes where a model is large.
    """
    for name, want in expected.items():
        if name in weights and weights[name].shape != want.shape:
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(weights[name].shape)}, {model} needs {tuple(want.shape)}; "
                "choose the --model this checkpoint was made for"
            )
    if missing := [name for name in expected if name not in weights]:
        raise CheckpointError(f"{source} lacks {listed(missing)}; it is not a checkpoint of {model}")
    if unknown := [name for name in weights if name not in expected]:
        raise CheckpointError(f"{source} holds {listed(unknown)}, which {model} does not have; choose another --model")

    def check_values() -> None:
        for done, (name, tensor) in enumerate(weights.items()):
            _check_values(f"{source}: {name}", tensor)
            if advance is not None:
                advance(done + 1, len(weights))

    files = [source] if source.is_file() else weight_files(source)
    once(f"finite {' '.join(map(sha256_of, files))}", check_values)


def _check_values(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise CheckpointError(f"{name} is stored as {tensor.dtype}; pass weights in fp32, bf16 or fp16")
    extremes = tensor.aminmax() if tensor.numel() else ()  # in one pass, without a copy
    if not all(extreme.isfinite() for extreme in extremes):
        raise CheckpointError(f"{name} holds NaN or infinity; the checkpoint is broken")
    if not all(extreme.float().isfinite() for extreme in extremes):
        raise CheckpointError(f"{name} holds values beyond fp32, which models run in; the checkpoint is broken")


def listed(names: Sequence[str] | Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + rest
