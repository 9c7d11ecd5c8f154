"""Tensors as they lie on disk: safetensors, whole or sharded, and PyTorch files, of which nothing is ever run."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from dyexport.errors import CheckpointError

WEIGHTS = "diffusion_pytorch_model.safetensors"
BINARY = "diffusion_pytorch_model.bin"
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
WRAPPERS = ("ema", "model", "module")  # where training files keep their weights; the averaged ones are preferred
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NAMED = 3  # how many of the tensors that do not fit an error names


def read_weights(source: Path) -> dict[str, Tensor]:
    """All tensors of a diffusers directory or of a single file, by the names and in the dtypes they are stored in."""
    files = _weight_files(source) if source.is_dir() else [source]
    return {name: tensor for file in files for name, tensor in _read_file(file).items()}


def read_names(file: Path) -> list[str]:
    """Names of the tensors in a file; reads none of their values."""
    if file.suffix != ".safetensors":
        return list(_read_file(file))
    try:
        with safe_open(file, framework="pt") as stored:
            return list(stored.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error


def _weight_files(directory: Path) -> list[Path]:
    for name in (WEIGHTS, BINARY):
        if (index := directory / f"{name}.index.json").is_file():
            return _shards(index)
        if (directory / name).is_file():
            return [directory / name]
    variants = sorted(directory.glob("diffusion_pytorch_model.*.safetensors"))
    if len(variants) != 1:
        found = f"several variants, {_listed([file.name for file in variants])}: pass one" if variants else "no weights"
        raise CheckpointError(f"{directory} holds {found}; {WEIGHTS} or {WEIGHTS}.index.json is expected there")
    return variants


def _shards(index: Path) -> list[Path]:
    """The files that an index names; each must lie beside it."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        shards = [index.with_name(name) for name in names]  # refuses names with a folder in them
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of shards: {error!r}; download the checkpoint again") from error
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(f"{index} names {_listed(missing)}, not to be found there; download the missing shards")
    return shards


def _read_file(file: Path) -> dict[str, Tensor]:
    if file.suffix in PICKLES:
        return _unwrap(file, _load_pickle(file))
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{file} is of no known kind; pass a .safetensors, {', '.join(PICKLES)} or a directory")
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error


def _load_pickle(file: Path) -> Any:
    """What a PyTorch file holds, of plain containers, tensors and the record of a training run's arguments."""
    try:
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except Exception as error:  # unpickling errors have no common base
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
    return dict(content)


def check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: Path, model: str) -> None:
    """Shapes, names, dtypes and finiteness against ``expected`` (which may be on the meta device)."""
    for name, want in expected.items():
        if name in weights and weights[name].shape != want.shape:
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(weights[name].shape)}, {model} needs {tuple(want.shape)}; "
                "choose the --model this checkpoint was made for"
            )
    if missing := [name for name in expected if name not in weights]:
        raise CheckpointError(f"{source} lacks {_listed(missing)}; it is not a checkpoint of {model}")
    if unknown := [name for name in weights if name not in expected]:
        raise CheckpointError(f"{source} holds {_listed(unknown)}, which {model} does not have; choose another --model")
    for name, tensor in weights.items():
        _check_values(f"{source}: {name}", tensor)


def _check_values(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise CheckpointError(f"{name} is stored as {tensor.dtype}; pass weights in fp32, bf16 or fp16")
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{name} holds NaN or infinity; the checkpoint is broken")


def _listed(names: Sequence[str] | Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + rest
