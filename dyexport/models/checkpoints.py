"""Reading and writing weights: diffusers directories, and dyexport's dynamic checkpoints.

A dynamic checkpoint is a diffusers directory (it loads as the stock, complete model) with three more
files: ``dynamic.json``, ``routers.safetensors`` and, for a model without trained routers,
``widths.safetensors``. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dyexport.bundle import Frozen
from dyexport.errors import CheckpointError, UsageError
from dyexport.models.base import get_adapter
from dyexport.models.dynamic import DynamicTransformer
from dyexport.presets import Preset, get_preset
from dyexport.tables import WidthTable

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
DYNAMIC = "dynamic.json"
ROUTERS = "routers.safetensors"
TABLE = "widths.safetensors"


class DynamicSpec(Frozen):
    """``dynamic.json``: which preset the routers were made for, and what they route."""

    preset: str
    heads: int
    groups: int
    tokens: bool


def find_checkpoint(source: str, preset: Preset) -> Path:
    """The directory that holds ``config.json``: a local path, or a hub id that is downloaded."""
    local = Path(source)
    if local.exists():
        for candidate in (local, local / "transformer"):
            if (candidate / CONFIG).is_file():
                return candidate
        raise CheckpointError(f"{source} has no {CONFIG}; --checkpoint takes a diffusers directory")
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise CheckpointError(f"{source} does not exist; pass a diffusers directory, a hub id, or --random-weights")
    return _download(source, preset)


def _download(hub_id: str, preset: Preset) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        root = snapshot_download(hub_id, allow_patterns=["transformer/*", CONFIG, "*.safetensors"])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot download {hub_id!r} for {preset.name} (no network?); "
            "pass --checkpoint with a local diffusers directory, or --random-weights"
        ) from error
    return find_checkpoint(root, preset)


def load_static(source: str, preset: Preset) -> nn.Module:
    """A stock backbone with the checkpoint's weights.

    Raises ``CheckpointError`` naming the first key that is missing, unknown, of another shape or not
    finite.
    """
    directory = find_checkpoint(source, preset)
    config = _merged_config(directory, preset)
    adapter = get_adapter(preset.backbone)
    with torch.device("meta"):
        backbone = adapter.build(config)
    weights = read_weights(directory)
    check_weights(weights, backbone.state_dict(), directory, preset.name)
    backbone = adapter.build(config)  # buffers that no checkpoint stores need real memory
    _check_copies(weights, backbone, directory)
    backbone.load_state_dict(weights)
    return backbone.eval()


def _merged_config(directory: Path, preset: Preset) -> dict[str, Any]:
    """The preset's sizes with the checkpoint's own epsilon."""
    config = preset.transformer_config()
    try:
        stored = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {directory / CONFIG}: {error}") from error
    if "norm_eps" in stored:
        config["norm_eps"] = stored["norm_eps"]
    return config


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a diffusers directory: safetensors (sharded or not), or a ``.bin`` read without unpickling."""
    files = sorted(directory.glob("diffusion_pytorch_model*.safetensors"))
    if files:
        return {name: tensor for file in files for name, tensor in _read_safetensors(file).items()}
    binary = directory / "diffusion_pytorch_model.bin"
    if not binary.is_file():
        raise CheckpointError(f"{directory} has neither {WEIGHTS} nor {binary.name}")
    try:
        weights: dict[str, Tensor] = torch.load(binary, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling errors have no common base
        raise CheckpointError(
            f"{binary} is damaged or holds code, which is never run; convert it to safetensors"
        ) from error
    return weights


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error


def check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: Path, model: str) -> None:
    """Names, shapes and finiteness against ``expected`` (which may be on the meta device)."""
    for name, want in expected.items():
        if name not in weights:
            raise CheckpointError(f"{source} lacks {name}; it is not a checkpoint of {model}")
        if weights[name].shape != want.shape:
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(weights[name].shape)}, {model} needs {tuple(want.shape)}; "
                "choose the --model this checkpoint was made for"
            )
    unknown = next((name for name in weights if name not in expected), None)
    if unknown is not None:
        raise CheckpointError(f"{source}: {unknown} is not a weight of {model}")
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{source}: {name} holds NaN or infinity; the checkpoint is broken")


def _check_copies(weights: Mapping[str, Tensor], backbone: nn.Module, source: Path) -> None:
    """Keys that name one shared tensor of the module must hold equal values in the file."""
    first: dict[int, str] = {}
    for name, tensor in backbone.state_dict(keep_vars=True).items():
        original = first.setdefault(tensor.data_ptr(), name)
        if original != name and not torch.equal(weights[name], weights[original]):
            raise CheckpointError(
                f"{source}: {name} differs from {original}; dyexport needs one embedder for all blocks, as in DiT"
            )


def save_static(backbone: nn.Module, directory: Path) -> None:
    """Write a stock module as a diffusers directory, shared tensors written out per block as diffusers does."""
    directory.mkdir(parents=True, exist_ok=True)
    config: Any = backbone.config
    settings = {"_class_name": type(backbone).__name__, **{k: v for k, v in config.items() if not k.startswith("_")}}
    (directory / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file({name: tensor.detach().clone() for name, tensor in backbone.state_dict().items()}, directory / WEIGHTS)


def save_dynamic(model: DynamicTransformer, directory: Path, preset: Preset) -> None:
    """Write a dynamic checkpoint."""
    save_static(model.backbone, directory)
    save_file(model.routers.state_dict(), directory / ROUTERS)
    spec = DynamicSpec(preset=preset.name, heads=model.heads, groups=model.groups, tokens=model.has_token_routers)
    (directory / DYNAMIC).write_text(spec.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if model.table is not None:
        model.table.save(directory / TABLE)


def is_dynamic(directory: Path) -> bool:
    """Whether a directory is a dynamic checkpoint."""
    return (directory / DYNAMIC).is_file()


def load_dynamic(directory: Path) -> tuple[DynamicTransformer, Preset]:
    """Read a dynamic checkpoint; raises ``CheckpointError`` naming what does not fit."""
    try:
        spec = DynamicSpec.model_validate_json((directory / DYNAMIC).read_text(encoding="utf-8"))
        preset = get_preset(spec.preset)
    except (OSError, ValidationError, UsageError) as error:
        raise CheckpointError(f"{directory} is not a dynamic checkpoint: {error}") from error
    backbone = load_static(str(directory), preset)
    model = DynamicTransformer(
        backbone, get_adapter(preset.backbone), heads=spec.heads, groups=spec.groups, tokens=spec.tokens
    )
    routers = _read_safetensors(directory / ROUTERS)
    check_weights(routers, model.routers.state_dict(), directory / ROUTERS, preset.name)
    model.routers.load_state_dict(routers)
    if (directory / TABLE).is_file():
        model.table = WidthTable.load(directory / TABLE)
    return model.eval(), preset
