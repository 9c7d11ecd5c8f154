"""Models from and to disk: diffusers directories, single files, published files, dynamic checkpoints.

A dynamic checkpoint is a diffusers directory (it loads as the stock, complete model) with three more
files: ``dynamic.json``, ``routers.safetensors`` and, for a model without trained routers,
``widths.safetensors``. Of a model trained by TD-LoRA the directory has the frozen backbone, and a file
``td_lora.safetensors`` what was trained. The truth for a published DiT, SiT or DyDiT file is the published code,
whose function two entries of ``config.json`` keep: ``freq_shift`` and ``stored_positions``.

Weights are read one tensor at a time, in the dtype they are stored in. What is taken as it is stays where it
is: the directories that a build makes of it hold links.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dyexport.architectures import FluxPreset, Preset, RouterKind
from dyexport.errors import CheckpointError, UsageError
from dyexport.lora import LoraSpec
from dyexport.manifest import Frozen
from dyexport.models import published
from dyexport.models.base import get_adapter
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.gates import WIDTH_BIAS
from dyexport.models.sources import CONFIG, find_checkpoint, read_config
from dyexport.models.stored import (
    WEIGHTS,
    StoredWeights,
    View,
    check_weights,
    link_weights,
    write_weights,
)
from dyexport.models.streaming import meta_parameters, stored_state, stream_backbone, stream_routers
from dyexport.models.user_lora import MergedWeights, UserLora
from dyexport.presets import get_preset
from dyexport.tables import WidthTable

DYNAMIC = "dynamic.json"
TD_LORA = "td_lora.safetensors"
PARTS = {"routers": "routers.safetensors", "td_lora": TD_LORA}  # of the dynamic model, by attribute
TABLE = "widths.safetensors"
ORDER = "order.safetensors"  # of a fine-tuned model's units, by their places in the model it was made from


class DynamicSpec(Frozen):
    """``dynamic.json``: which preset the routers were made for, and what they route."""

    preset: str
    heads: int
    groups: int
    tokens: bool
    router: RouterKind = "free"
    td_lora: LoraSpec | None = None

    def attach(self, backbone: nn.Module, preset: Preset) -> DynamicTransformer:
        """A dynamic model around a stock one, with new routers."""
        return DynamicTransformer(
            backbone,
            get_adapter(preset.backbone),
            heads=self.heads,
            groups=self.groups,
            tokens=self.tokens,
            router=self.router,
            td_lora=self.td_lora,
        )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What was found, checked tensor by tensor; none of its weights is in memory.

    ``weights`` are the stock module's, ``routers`` a dynamic model's, where a single file brings them. With
    ``stock`` the files hold just the weights, by diffusers' names, so that they can be taken as they are.
    """

    path: Path
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    routers: Mapping[str, Tensor]
    stock: bool


def open_checkpoint(source: str, preset: Preset) -> Checkpoint:
    """Find and check. Raises ``CheckpointError`` naming what is missing, unknown, of another shape or not finite."""
    path = find_checkpoint(source, preset)
    stored = StoredWeights(path)
    foreign = published.is_published(stored)
    config = {**preset.transformer_config(), **published.CONFIG} if foreign else read_config(path, preset)
    target = _target(preset, config, routers=published.has_routers(stored))
    found: Mapping[str, Tensor] = stored
    if foreign:
        check_weights(stored, published.expected(target, preset.depth), path, preset.name)
        found = published.translate(stored, target, preset.depth)
    elif isinstance(preset, FluxPreset) and published.has_routers(stored):
        names = published.dyflux_correspondence(target, preset.double_blocks)
        check_weights(stored, {name: tensor for name, (_, tensor) in names.items()}, path, preset.name)
        found = View({ours: (stored, name) for name, (ours, _) in names.items()})
    else:
        check_weights(stored, target, path, preset.name)
    _check_copies(found, preset, config, path)
    weights = View({name: (found, name) for name in found if not name.startswith("routers.")})
    routers = View({name.removeprefix("routers."): (found, name) for name in found if name.startswith("routers.")})
    stock = found is stored and stored.in_safetensors
    return Checkpoint(path=path, config=config, weights=weights, routers=routers, stock=stock)


def _meta_backbone(preset: Preset, config: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return get_adapter(preset.backbone).build(config)


def _target(preset: Preset, config: Mapping[str, Any], *, routers: bool) -> dict[str, Tensor]:
    """Names and shapes of the model to fill, without memory."""
    backbone = _meta_backbone(preset, config)
    if not routers:
        return dict(backbone.state_dict())
    with torch.device("meta"):
        model = DynamicTransformer(backbone, get_adapter(preset.backbone), heads=preset.heads)
    return all_weights(model)


def all_weights(model: DynamicTransformer) -> dict[str, Tensor]:
    """Backbone, routers and TD-LoRA by the names that slices read."""
    parts = {f"{part}.{name}": value for part, m in _parts(model).items() for name, value in m.state_dict().items()}
    return {**model.backbone.state_dict(), **parts}


def _check_copies(weights: Mapping[str, Tensor], preset: Preset, config: Mapping[str, Any], source: Path) -> None:
    """Keys that name one shared tensor of the module must hold equal values in the file."""
    first: dict[int, str] = {}
    tensors = _meta_backbone(preset, config).state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        original = first.setdefault(id(tensor), name)
        if original != name and not torch.equal(weights[name], weights[original]):
            raise CheckpointError(
                f"{source}: {name} differs from {original}; dyexport needs one embedder for all blocks, as in DiT"
            )


def has_routers(file: Path) -> bool:
    """Whether a single file brings routers, as published DyDiT does; reads names only."""
    return published.has_routers(StoredWeights(file))


def load_static(source: str, preset: Preset, *, stream: bool = False) -> nn.Module:
    """A stock backbone in fp32 with the checkpoint's weights; routers in a published file are left out.

    With ``stream`` the weights stay on disk and each is read when its layer runs. Raises ``CheckpointError``.
    """
    return _load(open_checkpoint(source, preset), preset, stream)


def _load(checkpoint: Checkpoint, preset: Preset, stream: bool) -> nn.Module:
    adapter = get_adapter(preset.backbone)
    if stream:
        return stream_backbone(adapter, checkpoint.config, checkpoint.weights).eval()
    backbone = adapter.build(checkpoint.config)
    _fill(backbone, checkpoint.weights)
    return backbone.eval()


@torch.no_grad()
def _fill(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy ``weights`` into a module, in its own dtype, one tensor at a time; streamed ones have no place for it."""
    for name, tensor in module.state_dict().items():
        if name in weights and not tensor.is_meta:
            tensor.copy_(weights[name])


def load_given(source: Path, preset: Preset, *, stream: bool = False) -> DynamicTransformer:
    """A model with its own routers: a dynamic checkpoint, or a published DyDiT file."""
    if source.is_dir():
        model, found = load_dynamic(source, stream=stream)
        if found.name != preset.name:
            raise CheckpointError(f"{source} is a checkpoint of {found.name}; build it with --model {found.name}")
        return model
    checkpoint = open_checkpoint(str(source), preset)
    spec = DynamicSpec(preset=preset.name, heads=preset.heads, groups=preset.heads, tokens=True)
    model = _dynamic(_load(checkpoint, preset, stream), preset, spec, {"routers": checkpoint.routers}, stream)
    if not any(".heads." in name for name in checkpoint.routers):
        open_widths(model, preset)
    return model


def _dynamic(
    backbone: nn.Module, preset: Preset, spec: DynamicSpec, parts: Mapping[str, Mapping[str, Tensor]], stream: bool
) -> DynamicTransformer:
    """The model with the weights of its ``parts``."""
    with meta_parameters(stream):
        model = spec.attach(backbone, preset)
    if stream:
        stream_routers(model.block_routers, parts["routers"])
        if model.td_lora is not None:
            model.td_lora.to_empty(device="cpu")
    for name, module in _parts(model).items():
        _fill(module, parts[name])
    return model.eval()


def _parts(model: DynamicTransformer) -> dict[str, nn.Module]:
    """What a dynamic model has beside its backbone."""
    return {name: module for name in PARTS if (module := getattr(model, name)) is not None}


@torch.no_grad()
def open_widths(model: DynamicTransformer, preset: Preset) -> None:
    """For a file with token routers alone: every unit on at every t, until a budget chooses some."""
    for router in model.block_routers:
        for linear in (router.heads, router.groups):
            nn.init.zeros_(linear.weight)
            nn.init.constant_(linear.bias, WIDTH_BIAS)
    start, end = preset.timestep_range
    heads, groups = (np.ones((1, model.depth, units), dtype=bool) for units in (model.heads, model.groups))
    model.table = WidthTable(grid=np.array([start]), end=end, heads=heads, groups=groups)


def load_dynamic(directory: Path, *, stream: bool = False) -> tuple[DynamicTransformer, Preset]:
    """Read a dynamic checkpoint; raises ``CheckpointError`` naming what does not fit."""
    spec = read_spec(directory)
    preset = get_preset(spec.preset)
    backbone: Any = load_static(str(directory), preset, stream=stream)
    with torch.device("meta"):
        expected = _parts(spec.attach(_meta_backbone(preset, backbone.config), preset))
    parts = {name: StoredWeights(directory / PARTS[name]) for name in expected}
    for name, module in expected.items():
        check_weights(parts[name], module.state_dict(), directory / PARTS[name], preset.name)
    model = _dynamic(backbone, preset, spec, parts, stream)
    if (directory / TABLE).is_file():
        model.table = WidthTable.load(directory / TABLE)
    if (directory / ORDER).is_file():
        model.order = load_file(directory / ORDER)
    return model, preset


def read_spec(directory: Path) -> DynamicSpec:
    """What a dynamic checkpoint says of itself; its preset is known."""
    try:
        spec = DynamicSpec.model_validate_json((directory / DYNAMIC).read_text(encoding="utf-8"))
        get_preset(spec.preset)
    except (OSError, ValidationError, UsageError) as error:
        raise CheckpointError(f"{directory} is not a dynamic checkpoint: {error}") from error
    return spec


def dynamic_weights(directory: Path) -> Mapping[str, Tensor]:
    """All of a dynamic checkpoint by the names that slices read; each tensor is read when asked for."""
    stored = {
        f"{name}.": StoredWeights(directory / file) for name, file in PARTS.items() if (directory / file).is_file()
    }
    stored[""] = StoredWeights(directory)
    return View({f"{prefix}{name}": (weights, name) for prefix, weights in stored.items() for name in weights})


def adopt_static(source: str, preset: Preset, directory: Path, lora: UserLora | None = None) -> None:
    """Make ``directory`` a diffusers directory of a checkpoint: of links to it, unless it must be changed."""
    checkpoint = open_checkpoint(source, preset)
    _write_config(_meta_backbone(preset, checkpoint.config), directory)
    if lora is not None:
        lora.check(checkpoint.weights, preset.name)
        write_weights(_with_lora(checkpoint, preset, lora), directory / WEIGHTS)
    elif checkpoint.stock:
        link_weights(checkpoint.path, directory)
    else:
        write_weights(checkpoint.weights, directory / WEIGHTS)


def _with_lora(checkpoint: Checkpoint, preset: Preset, lora: UserLora) -> Mapping[str, Tensor]:
    """A LoRA's channels are in the order of the published model; those of a fine-tuned one may not be."""
    file = checkpoint.path / ORDER
    if not file.is_file():
        return MergedWeights(checkpoint.weights, lora)
    order, backbone = load_file(file), _load(checkpoint, preset, stream=False)
    _reorder(backbone, preset, {name: units.argsort(dim=1) for name, units in order.items()})
    _fill(backbone, MergedWeights(backbone.state_dict(), lora))
    _reorder(backbone, preset, order)
    return backbone.state_dict()


def _reorder(backbone: nn.Module, preset: Preset, order: Mapping[str, Tensor]) -> None:
    for block in range(preset.depth):
        get_adapter(preset.backbone).permute_units(backbone, block, order["heads"][block], order["groups"][block])


def save_static(backbone: nn.Module, directory: Path) -> None:
    """Write a stock module as a diffusers directory, shared tensors written out per block as diffusers does."""
    _write_config(backbone, directory)
    write_weights(backbone.state_dict(), directory / WEIGHTS)


def _write_config(backbone: Any, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    config: Any = backbone.config
    settings = {"_class_name": type(backbone).__name__, **{k: v for k, v in config.items() if not k.startswith("_")}}
    (directory / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_dynamic(model: DynamicTransformer, directory: Path, preset: Preset, *, backbone: Path | None = None) -> None:
    """Write a dynamic checkpoint. ``backbone`` is a diffusers directory that has the model's backbone already."""
    if backbone is None:
        save_static(model.backbone, directory)
    else:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(backbone / CONFIG, directory / CONFIG)
        link_weights(backbone, directory)
    for name, module in _parts(model).items():
        write_weights(stored_state(module), directory / PARTS[name])
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
    if model.order is not None:
        save_file(dict(model.order), directory / ORDER)
