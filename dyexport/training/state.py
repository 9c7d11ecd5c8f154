"""State of a training run on disk: one safetensors file, replaced atomically and never pickled."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dyexport.errors import CheckpointError
from dyexport.files import replacing

ORIGIN = "origin"  # entry of a file's metadata: a hash of everything that its tensors were made from


class SavedState(NamedTuple):
    step: int  # steps done
    tensors: dict[str, Tensor]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically. Raises ``StorageError``."""
    with replacing(path) as partial:
        save_file({name: value.detach().contiguous() for name, value in tensors.items()}, partial, dict(metadata))


def origin_of(path: Path) -> str | None:
    """Read the origin of a file of tensors; None if it has none or cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(ORIGIN)
    except (OSError, SafetensorError):
        return None


def save_state(path: Path, state: SavedState, run: str) -> None:
    write_tensors(path, state.tensors, {"run": run, "step": str(state.step)})


def load_state(path: Path, run: str) -> SavedState | None:
    """Load the state that the same run saved; None if there is none. Raises ``CheckpointError`` for a damaged file."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("run") != run:
                return None
            return SavedState(int(metadata["step"]), {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"cannot read {path} ({error}); delete it to start over") from error


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Hash a model's weights."""
    digest = hashlib.sha256()
    for name, value in model.named_parameters():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def run_digest(*parts: str, model: nn.Module) -> str:
    """Hash a run: its settings and data, and the weights that it begins with."""
    return hashlib.sha256("\n".join((*parts, fingerprint(model))).encode()).hexdigest()
