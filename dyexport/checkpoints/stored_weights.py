"""Tensors on disk, read lazily: safetensors, whole or sharded, PyTorch files and GGUF. Code in pickles never runs."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dyexport.backbones.dialect import Part
from dyexport.checkpoints.locate import PICKLES, SAFETENSORS, check_kind
from dyexport.checkpoints.quantized import GgufWeights
from dyexport.checkpoints.weight_files import check_readable, weight_files
from dyexport.errors import CheckpointError

WRAPPERS = ("ema", "model", "module")  # where training files keep their weights; the averaged ones are preferred
PREFIXES = ("module.", "model.", "diffusion_model.", "_orig_mod.", "ema_model.")  # of DDP, trainers, ComfyUI, compile


class StoredWeights(Mapping[str, Tensor]):
    """Tensors on disk, by the names and in the dtypes they are stored in.

    Each tensor is read lazily and not cached, so a model may be larger than memory.
    """

    def __init__(self, source: Path) -> None:
        """Read the names of a diffusers directory or a single file. Raises ``CheckpointError``."""
        self._files: dict[str, Path] = {}  # file of each tensor in safetensors
        self._loaded: Mapping[str, Tensor] = {}  # tensors of PyTorch and GGUF files
        for file in weight_files(source) if source.is_dir() else [source]:
            check_kind(file)
            if file.suffix == SAFETENSORS:
                self._files |= dict.fromkeys(_names(file), file)
            elif file.suffix in PICKLES:
                self._loaded = {**self._loaded, **_unwrap(file, _load_pickle(file))}
            else:
                self._loaded = GgufWeights(file)

    def __getitem__(self, name: str) -> Tensor:
        return self._loaded[name] if name in self._loaded else _tensor(self._files[name], name)

    def __contains__(self, name: object) -> bool:
        return name in self._files or name in self._loaded

    def __iter__(self) -> Iterator[str]:
        yield from self._files
        yield from self._loaded

    def __len__(self) -> int:
        return len(self._files) + len(self._loaded)

    @property
    def in_safetensors(self) -> bool:
        """True if all tensors are in safetensors files."""
        return not self._loaded


class View(Mapping[str, Tensor]):
    """Tensors under other names. ``places`` maps each name to a mapping and the tensor's name in it."""

    def __init__(self, places: Mapping[str, tuple[Mapping[str, Tensor], str]]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> Tensor:
        weights, stored_name = self._places[name]
        return weights[stored_name]

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class Rows(Mapping[str, Tensor]):
    """Tensors made of rows of others, read lazily. ``places`` maps each name to the parts of ``weights`` to join."""

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
    """Return weights under names without the prefixes that all of them have, such as that of a wrapping module."""
    names = {name: name for name in weights}  # short -> stored
    while prefix := next((p for p in PREFIXES if names and all(name.startswith(p) for name in names)), None):
        names = {name.removeprefix(prefix): stored for name, stored in names.items()}
    if all(name == stored for name, stored in names.items()):
        return weights
    return View({name: (weights, stored) for name, stored in names.items()})


def _names(file: Path) -> list[str]:
    with _opened(file) as stored:
        return list(stored.keys())


def _tensor(file: Path, name: str) -> Tensor:
    """Read a tensor of a safetensors file, which stays memory-mapped as long as the tensor exists."""
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


def _load_pickle(file: Path) -> Any:
    """Load a PyTorch file of containers, tensors and an ``argparse.Namespace``. Raises ``CheckpointError``."""
    try:
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except Exception as error:  # unpickling errors have no common base
        check_readable(file)
        raise CheckpointError(
            f"{file} is damaged or holds code, which is never run; convert it to safetensors"
        ) from error


def _unwrap(file: Path, content: Any) -> dict[str, Tensor]:
    """Return the weights of a training file, under one of ``WRAPPERS``, or of a plain state dict."""
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
