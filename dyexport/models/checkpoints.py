"""Models from and to disk: diffusers directories, single files, published files, dynamic checkpoints.

A dynamic checkpoint is a diffusers directory (it loads as the stock, complete model) with three more
files: ``dynamic.json``, ``routers.safetensors`` and, for a model without trained routers,
``widths.safetensors``. Of a model trained by TD-LoRA the directory has the frozen backbone, and a file
``td_lora.safetensors`` what was trained. The truth for a published DiT, SiT or DyDiT file is the published code,
whose function two entries of ``config.json`` keep: ``freq_shift`` and ``stored_positions``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from dyexport.bundle import Frozen
from dyexport.errors import CheckpointError, UsageError
from dyexport.lora import LoraSpec
from dyexport.models import published
from dyexport.models.base import get_adapter
from dyexport.models.dit import FREQ_SHIFT, STORED_POSITIONS
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.stored import WEIGHTS, check_weights, read_names, read_weights
from dyexport.presets import FluxPreset, Preset, RouterKind, get_preset
from dyexport.tables import WidthTable

CONFIG = "config.json"
DYNAMIC = "dynamic.json"
ROUTERS = "routers.safetensors"
TD_LORA = "td_lora.safetensors"
TABLE = "widths.safetensors"
OWN_CONFIG = ("norm_eps", FREQ_SHIFT, STORED_POSITIONS)  # what a checkpoint may say otherwise than its preset


class DynamicSpec(Frozen):
    """``dynamic.json``: which preset the routers were made for, and what they route."""

    preset: str
    heads: int
    groups: int
    tokens: bool
    router: RouterKind = "free"
    td_lora: LoraSpec | None = None


def find_checkpoint(source: str, preset: Preset) -> Path:
    """The file, or the directory that holds ``config.json``: a local path, or a hub id that is downloaded."""
    local = Path(source)
    if local.is_file():
        return local
    if local.exists():
        for candidate in (local, local / "transformer"):
            if (candidate / CONFIG).is_file():
                return candidate
        raise CheckpointError(f"{source} has no {CONFIG}; --checkpoint takes a diffusers directory, a file or a hub id")
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise CheckpointError(
            f"{source} does not exist; pass a diffusers directory, a file, a hub id, or --random-weights"
        )
    return _download(source, preset)


def _download(hub_id: str, preset: Preset) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        root = snapshot_download(hub_id, allow_patterns=["transformer/*", CONFIG, "diffusion_pytorch_model*"])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot download {hub_id!r} for {preset.name} (no network?); "
            "pass --checkpoint with a local diffusers directory, or --random-weights"
        ) from error
    return find_checkpoint(root, preset)


def load_static(source: str, preset: Preset) -> nn.Module:
    """A stock backbone in fp32 with the checkpoint's weights; routers in a published file are left out.

    Raises ``CheckpointError`` naming what is missing, unknown, of another shape or not finite.
    """
    return _load(find_checkpoint(source, preset), preset)[0]


def load_given(source: Path, preset: Preset) -> DynamicTransformer:
    """A model with its own routers: a dynamic checkpoint, or a published DyDiT file."""
    if source.is_dir():
        model, found = load_dynamic(source)
        if found.name != preset.name:
            raise CheckpointError(f"{source} is a checkpoint of {found.name}; build it with --model {found.name}")
        return model
    backbone, routers = _load(source, preset)
    model = DynamicTransformer(backbone, get_adapter(preset.backbone), heads=preset.heads)
    if not any(".heads." in name for name in routers):
        open_widths(model, preset)
        routers = {**model.routers.state_dict(), **routers}
    model.routers.load_state_dict(routers)
    return model.eval()


@torch.no_grad()
def open_widths(model: DynamicTransformer, preset: Preset) -> None:
    """For a file with token routers alone: every unit on at every t, until a budget chooses some."""
    for router in model.block_routers:
        nn.init.zeros_(router.heads.weight)
        nn.init.zeros_(router.groups.weight)
    start, end = preset.timestep_range
    heads, groups = (np.ones((1, model.depth, units), dtype=bool) for units in (model.heads, model.groups))
    model.table = WidthTable(grid=np.array([start]), end=end, heads=heads, groups=groups)


def has_routers(file: Path) -> bool:
    """Whether a single file brings routers, as published DyDiT does; reads names only."""
    return published.has_routers(read_names(file))


def _load(path: Path, preset: Preset) -> tuple[nn.Module, dict[str, Tensor]]:
    """The backbone, and the routers' state dict, empty where the file has none."""
    weights = read_weights(path)
    foreign = published.is_published(weights)
    config = {**preset.transformer_config(), **published.CONFIG} if foreign else read_config(path, preset)
    if foreign:
        target = _target(preset, config, routers=published.has_routers(weights))
        check_weights(weights, published.expected(target, preset.depth), path, preset.name)
        weights = published.translate(weights, target, preset.depth)
    elif isinstance(preset, FluxPreset) and published.has_routers(weights):
        names = published.dyflux_correspondence(_target(preset, config, routers=True), preset.double_blocks)
        check_weights(weights, {name: tensor for name, (_, tensor) in names.items()}, path, preset.name)
        weights = {names[name][0]: tensor for name, tensor in weights.items()}
    else:
        check_weights(weights, _target(preset, config, routers=False), path, preset.name)
    backbone = get_adapter(preset.backbone).build(config)  # buffers that no checkpoint stores need real memory
    _check_copies(weights, backbone, path)
    backbone.load_state_dict({name: tensor for name, tensor in weights.items() if not name.startswith("routers.")})
    routers = {name.removeprefix("routers."): tensor for name, tensor in weights.items() if name.startswith("routers.")}
    return backbone.eval(), routers


def _target(preset: Preset, config: Mapping[str, Any], *, routers: bool) -> dict[str, Tensor]:
    """Names and shapes of the model to fill, without memory."""
    adapter = get_adapter(preset.backbone)
    with torch.device("meta"):
        backbone = adapter.build(config)
        if not routers:
            return dict(backbone.state_dict())
        return all_weights(DynamicTransformer(backbone, adapter, heads=preset.heads))


def all_weights(model: DynamicTransformer) -> dict[str, Tensor]:
    """Backbone, routers and TD-LoRA by the names that slices read."""
    parts = {"routers": model.routers, "td_lora": model.td_lora}
    ours = {
        f"{part}.{name}": value
        for part, module in parts.items()
        if module is not None
        for name, value in module.state_dict().items()
    }
    return {**model.backbone.state_dict(), **ours}


def read_config(path: Path, preset: Preset) -> dict[str, Any]:
    """The preset's sizes with the checkpoint's own ``OWN_CONFIG``; a single file's config may lie beside it."""
    config = preset.transformer_config()
    file = (path if path.is_dir() else path.parent) / CONFIG
    if path.is_file() and not file.is_file():
        return config
    try:
        stored = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    for name, want in json.loads(json.dumps(config)).items():
        if name not in OWN_CONFIG and stored.get(name) not in (None, want):
            raise CheckpointError(
                f"{file}: {name} is {stored[name]}, {preset.name} has {want}; "
                "choose the --model this checkpoint was made for"
            )
    return config | {name: stored[name] for name in OWN_CONFIG if name in stored}


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
    if model.td_lora is not None:
        save_file(model.td_lora.state_dict(), directory / TD_LORA)
    spec = DynamicSpec(
        preset=preset.name,
        heads=model.heads,
        groups=model.groups,
        tokens=model.has_token_routers,
        router=model.router,
        td_lora=None if model.td_lora is None else model.td_lora.spec,
    )
    (directory / DYNAMIC).write_text(spec.model_dump_json(indent=2, exclude_none=True) + "\n", encoding="utf-8")
    if model.table is not None:
        model.table.save(directory / TABLE)


def read_spec(directory: Path) -> DynamicSpec:
    """What a dynamic checkpoint says of itself; its preset is known."""
    try:
        spec = DynamicSpec.model_validate_json((directory / DYNAMIC).read_text(encoding="utf-8"))
        get_preset(spec.preset)
    except (OSError, ValidationError, UsageError) as error:
        raise CheckpointError(f"{directory} is not a dynamic checkpoint: {error}") from error
    return spec


def load_dynamic(directory: Path) -> tuple[DynamicTransformer, Preset]:
    """Read a dynamic checkpoint; raises ``CheckpointError`` naming what does not fit."""
    spec = read_spec(directory)
    preset = get_preset(spec.preset)
    backbone = load_static(str(directory), preset)
    model = DynamicTransformer(
        backbone,
        get_adapter(preset.backbone),
        heads=spec.heads,
        groups=spec.groups,
        tokens=spec.tokens,
        router=spec.router,
        td_lora=spec.td_lora,
    )
    _load_part(model.routers, directory / ROUTERS, preset)
    if model.td_lora is not None:
        _load_part(model.td_lora, directory / TD_LORA, preset)
    if (directory / TABLE).is_file():
        model.table = WidthTable.load(directory / TABLE)
    return model.eval(), preset


def _load_part(module: nn.Module, file: Path, preset: Preset) -> None:
    weights = read_weights(file)
    check_weights(weights, module.state_dict(), file, preset.name)
    module.load_state_dict(weights)
