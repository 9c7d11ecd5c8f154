"""Stock models from and to disk: diffusers directories, single files, published files.

The reference for a file with the names of other code is that code. Where it computes something else than
diffusers, entries of ``config.json`` say so (``Dialect.numerics``).

Weights are read one tensor at a time, in the dtype they are stored in. What is taken as it is stays where it
is: the directories that a build makes of it hold links.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dyexport.backbones import get_adapter, part
from dyexport.backbones.base import Part, Preset
from dyexport.checkpoints.dialects import find_dialect, has_router_names, plain_weights
from dyexport.checkpoints.locate import CONFIG, find_checkpoint
from dyexport.checkpoints.stored_weights import (
    WEIGHTS,
    Rows,
    StoredWeights,
    View,
    check_weights,
    link_weights,
    write_shards,
    write_weights,
)
from dyexport.checkpoints.streaming import stream_backbone
from dyexport.checkpoints.structure import read_config
from dyexport.checkpoints.user_lora import MergedWeights, UserLora
from dyexport.errors import CheckpointError
from dyexport.lora import LoraFile
from dyexport.models.dynamic import DynamicTransformer
from dyexport.progress import Progress

ORDER = "order.safetensors"  # of a fine-tuned model's units, by their places in the model it was made from


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Checkpoint whose tensors were checked one by one; none of its weights is in memory.

    ``weights`` are the stock module's, ``routers`` a dynamic model's, where a single file brings them. With
    ``stock`` the files hold just the weights, by diffusers' names, so that they can be taken as they are.
    """

    path: Path
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    routers: Mapping[str, Tensor]
    stock: bool


def open_checkpoint(source: str, preset: Preset, advance: Progress | None = None) -> Checkpoint:
    """Find and check; ``advance`` gets tensors checked, of how many.

    Raises ``CheckpointError`` naming what is missing, unknown, of another shape or not finite.
    """
    path = find_checkpoint(source)
    files = StoredWeights(path)
    stored = plain_weights(files)
    dialect = find_dialect(stored)
    if dialect is not None and dialect not in part(preset.backbone, "published").DIALECTS:
        raise CheckpointError(
            f"{path} has the names of {dialect.description}, and {preset.name} takes a diffusers directory; "
            "give that, or the --model this checkpoint was made for"
        )
    if dialect is not None and dialect.numerics:
        config = {**preset.transformer_config(), **dialect.numerics}
    else:
        config = read_config(path, preset)
    target = _target(preset, config, routers=has_router_names(stored))
    found = stored
    if dialect is not None:
        places = dialect.places(target, preset)
        check_weights(stored, _stored_shapes(places, target), path, preset.name, advance)
        found = Rows(stored, places)
    else:
        check_weights(stored, target, path, preset.name, advance)
    _check_copies(found, preset, config, path)
    weights = View({name: (found, name) for name in found if not name.startswith("routers.")})
    routers = View({name.removeprefix("routers."): (found, name) for name in found if name.startswith("routers.")})
    stock = found is files and files.in_safetensors
    return Checkpoint(path=path, config=config, weights=weights, routers=routers, stock=stock)


def _stored_shapes(places: Mapping[str, tuple[Part, ...]], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return names and shapes in a file whose rows make up ``target``, without memory."""
    shapes: dict[str, Tensor] = {}
    for name, parts in places.items():
        rows, *columns = target[name].shape
        for piece in parts:
            stored_rows = rows // len(parts) // (piece.stop - piece.start) * piece.of
            shapes[piece.name] = torch.empty(stored_rows, *columns, device="meta")
    return shapes


def meta_backbone(preset: Preset, config: Mapping[str, Any]) -> nn.Module:
    """Make the stock module on the meta device."""
    with torch.device("meta"):
        return get_adapter(preset.backbone).build(config)


def _target(preset: Preset, config: Mapping[str, Any], *, routers: bool) -> dict[str, Tensor]:
    """Names and shapes of the model to fill, without memory."""
    backbone = meta_backbone(preset, config)
    if not routers:
        return dict(backbone.state_dict())
    with torch.device("meta"):
        model = DynamicTransformer(backbone, get_adapter(preset.backbone), heads=preset.heads)
    return model.all_weights()


def _check_copies(weights: Mapping[str, Tensor], preset: Preset, config: Mapping[str, Any], source: Path | str) -> None:
    """Keys that name one shared tensor of the module must hold equal values in the file."""
    first: dict[int, str] = {}
    tensors = meta_backbone(preset, config).state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        original = first.setdefault(id(tensor), name)
        if original != name and not torch.equal(weights[name], weights[original]):
            raise CheckpointError(
                f"{source}: {name} differs from {original}; dyexport needs one embedder for all blocks, as in DiT"
            )


def load_static(source: str, preset: Preset, *, stream: bool = False) -> nn.Module:
    """Load a stock backbone in fp32 with the checkpoint's weights; routers in a published file are left out.

    With ``stream`` the weights stay on disk and each is read when its layer runs. Raises ``CheckpointError``.
    """
    return load_backbone(open_checkpoint(source, preset), preset, stream=stream)


def load_backbone(checkpoint: Checkpoint, preset: Preset, *, stream: bool) -> nn.Module:
    """Make a stock backbone with the weights of a checkpoint."""
    adapter = get_adapter(preset.backbone)
    if stream:
        return stream_backbone(adapter, checkpoint.config, checkpoint.weights).eval()
    backbone = adapter.build(checkpoint.config)
    fill(backbone, checkpoint.weights)
    return backbone.eval()


@torch.no_grad()
def fill(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy ``weights`` into a module, in its own dtype, one tensor at a time; streamed ones have no place for it."""
    for name, tensor in module.state_dict().items():
        if name in weights and not tensor.is_meta:
            tensor.copy_(weights[name])


def adopt_static(
    source: str, preset: Preset, directory: Path, loras: Sequence[LoraFile] = (), advance: Progress | None = None
) -> None:
    """Make ``directory`` a diffusers directory of a checkpoint: of links to it, unless it must be changed."""
    checkpoint = open_checkpoint(source, preset, advance)
    _write_config(meta_backbone(preset, checkpoint.config), directory)
    if loras:
        write_shards(_with_loras(checkpoint, preset, loras), directory)
    elif checkpoint.stock:
        link_weights(checkpoint.path, directory)
    else:
        write_shards(checkpoint.weights, directory)


def _with_loras(checkpoint: Checkpoint, preset: Preset, loras: Sequence[LoraFile]) -> Mapping[str, Tensor]:
    """A LoRA's channels are in the order of the published model; those of a fine-tuned one may not be."""
    stock = meta_backbone(preset, checkpoint.config)
    opened = [UserLora(lora, preset, stock) for lora in loras]
    names = " and ".join(str(lora.file) for lora in loras)
    order = checkpoint.path / ORDER
    if not order.is_file():
        merged = MergedWeights(checkpoint.weights, opened)
        _check_copies(merged, preset, checkpoint.config, names)
        return merged
    units, backbone = read_order(order, preset), load_backbone(checkpoint, preset, stream=False)
    _reorder(backbone, preset, {name: places.argsort(dim=1) for name, places in units.items()})
    merged = MergedWeights(backbone.state_dict(), opened)
    _check_copies(merged, preset, checkpoint.config, names)
    fill(backbone, dict(merged))
    _reorder(backbone, preset, units)
    return backbone.state_dict()


def read_order(file: Path, preset: Preset) -> dict[str, Tensor]:
    """Read the places of units before ranking: ``heads`` (L, H), ``groups`` (L, G). Raises ``CheckpointError``."""
    stored = StoredWeights(file)
    for name in ("heads", "groups"):
        units = stored[name] if name in stored else torch.zeros(0)
        if units.ndim != 2 or len(units) != preset.depth or not _is_order(units):
            raise CheckpointError(f"{file}: {name} are no order of units in {preset.depth} blocks; it is damaged")
    return {name: stored[name] for name in stored}


def _is_order(units: Tensor) -> bool:
    return torch.equal(units.sort(dim=1).values, torch.arange(units.shape[1]).expand_as(units))


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
