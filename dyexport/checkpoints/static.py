"""Reading and writing of stock models: diffusers directories, single files, published files.

A file with the names of other code must give the results of that code. Where they differ from diffusers',
``Dialect.numerics`` has the configuration entries that make up for it.

Weights are read one tensor at a time, in the dtype they are stored in. Weights that need no change are not copied:
a build links to them.
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
from dyexport.backbones.base import Preset
from dyexport.backbones.dialect import Part
from dyexport.checkpoints.dialects import find_dialect, has_router_names, plain_weights
from dyexport.checkpoints.locate import CONFIG, find_checkpoint
from dyexport.checkpoints.stored_weights import Rows, StoredWeights, View
from dyexport.checkpoints.streaming import stream_backbone
from dyexport.checkpoints.structure import read_config
from dyexport.checkpoints.user_lora import MergedWeights, UserLora
from dyexport.checkpoints.weight_checks import check_weights
from dyexport.checkpoints.weight_files import WEIGHTS, link_weights, write_shards, write_weights
from dyexport.errors import CheckpointError
from dyexport.lora import LoraFile
from dyexport.models.dynamic import DynamicTransformer
from dyexport.progress import Progress

ORDER = "order.safetensors"  # position of each head and group of a fine-tuned model in the model it was made from


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Checkpoint whose tensors have been checked. None of its weights is in memory.

    weights  tensors of the stock module
    routers  tensors of a dynamic model's routers; empty unless a single file contains them
    stock    True if the files hold only the weights, in safetensors and by diffusers' names, and can be linked to
    """

    path: Path
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    routers: Mapping[str, Tensor]
    stock: bool


def open_checkpoint(source: str, preset: Preset, advance: Progress | None = None) -> Checkpoint:
    """Find and check a checkpoint.

    ``advance`` is called with the number of tensors checked and their total. Raises ``CheckpointError`` naming a
    tensor that is missing, unknown, of another shape or not finite.
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
    tensors = stored
    if dialect is not None:
        places = dialect.places(target, preset)
        check_weights(stored, _stored_shapes(places, target), path, preset.name, advance)
        tensors = Rows(stored, places)
    else:
        check_weights(stored, target, path, preset.name, advance)
    _check_copies(tensors, preset, config, path)
    weights = View({name: (tensors, name) for name in tensors if not name.startswith("routers.")})
    routers = View({name.removeprefix("routers."): (tensors, name) for name in tensors if name.startswith("routers.")})
    stock = tensors is files and files.in_safetensors
    return Checkpoint(path=path, config=config, weights=weights, routers=routers, stock=stock)


def _stored_shapes(places: Mapping[str, tuple[Part, ...]], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that a file must have to fill ``target``, on the meta device."""
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
    """Return the tensors of the model to fill, on the meta device."""
    backbone = meta_backbone(preset, config)
    if not routers:
        return dict(backbone.state_dict())
    with torch.device("meta"):
        adapter, kind = get_adapter(preset.backbone), preset.token_routers[0]
        model = DynamicTransformer(backbone, adapter, heads=preset.heads, token_router=kind)
    return model.all_weights()


def _check_copies(weights: Mapping[str, Tensor], preset: Preset, config: Mapping[str, Any], source: Path | str) -> None:
    """Check that a file has equal values under all names of a tensor that the module shares.

    Raises ``CheckpointError``.
    """
    first: dict[int, str] = {}
    tensors = meta_backbone(preset, config).state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        original = first.setdefault(id(tensor), name)
        if original != name and not torch.equal(weights[name], weights[original]):
            raise CheckpointError(
                f"{source}: {name} differs from {original}; dyexport needs one embedder for all blocks, as in DiT: "
                "train with one that they share, or store one block's weights under all names"
            )


def load_static(source: str, preset: Preset, *, stream: bool = False, device: str = "cpu") -> nn.Module:
    """Load a stock backbone in fp32 onto ``device``; routers in a published file are ignored.

    With ``stream`` the weights stay on disk, and each is read when its layer runs. Raises ``CheckpointError``.
    """
    return load_backbone(open_checkpoint(source, preset), preset, stream=stream, device=device)


def load_backbone(checkpoint: Checkpoint, preset: Preset, *, stream: bool, device: str = "cpu") -> nn.Module:
    """Make a stock backbone with the weights of a checkpoint."""
    adapter = get_adapter(preset.backbone)
    if stream:
        return stream_backbone(adapter, checkpoint.config, checkpoint.weights, device).eval()
    backbone = adapter.build(checkpoint.config)
    fill(backbone, checkpoint.weights)
    return backbone.eval().to(device)


@torch.no_grad()
def fill(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy ``weights`` into a module, in the module's dtype, one tensor at a time. Streamed tensors are skipped."""
    for name, tensor in module.state_dict().items():
        if name in weights and not tensor.is_meta:
            tensor.copy_(weights[name])


def adopt_static(
    source: str, preset: Preset, directory: Path, loras: Sequence[LoraFile] = (), advance: Progress | None = None
) -> None:
    """Make ``directory`` a diffusers directory with a checkpoint's weights.

    It links to the checkpoint's files; with LoRAs, or where names or dtypes differ, it has files with new weights.
    ``advance`` is that of ``open_checkpoint``. Raises ``CheckpointError``.
    """
    checkpoint = open_checkpoint(source, preset, advance)
    write_config(meta_backbone(preset, checkpoint.config), directory)
    if loras:
        write_shards(_with_loras(checkpoint, preset, loras), directory)
    elif checkpoint.stock:
        link_weights(checkpoint.path, directory)
    else:
        write_shards(checkpoint.weights, directory)


def _with_loras(checkpoint: Checkpoint, preset: Preset, loras: Sequence[LoraFile]) -> Mapping[str, Tensor]:
    """Merge LoRAs into a checkpoint's weights.

    A LoRA expects heads and groups in the order of the published model. A fine-tuned model may have another order,
    and is put into the published order for the merge.
    """
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
    """Read the positions of units before ranking: ``heads`` (L, H), ``groups`` (L, G). Raises ``CheckpointError``."""
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
    """Write a stock module as a diffusers directory. As in diffusers, each block gets a copy of shared tensors."""
    write_config(backbone, directory)
    write_weights(backbone.state_dict(), directory / WEIGHTS)


def write_config(backbone: Any, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    config: Any = backbone.config
    settings = {"_class_name": type(backbone).__name__, **{k: v for k, v in config.items() if not k.startswith("_")}}
    (directory / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
