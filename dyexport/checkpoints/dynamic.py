"""Reading and writing of dynamic checkpoints: models with routers.

A dynamic checkpoint is a diffusers directory, which diffusers loads as the complete stock model. It has more files:

    dynamic.json           the preset and the shape of the routers
    routers.safetensors    weights of the routers
    widths.safetensors     widths over t, for a model without trained routers
    td_lora.safetensors    updates of a model that was trained by TD-LoRA
    order.safetensors      order of heads and groups after ranking

A backbone trained by TD-LoRA has its original weights, except for biases where those were trained.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import AfterValidator, PositiveInt, ValidationError, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn

from dyexport.backbones import get_adapter
from dyexport.backbones.base import Preset, RouterKind
from dyexport.backbones.recipe import BasePrecision
from dyexport.bundle.records import Frozen, first_problem
from dyexport.bundle.spec import TokenRouterKind
from dyexport.bundle.tables import WidthTable
from dyexport.checkpoints.locate import CONFIG
from dyexport.checkpoints.placement import load_placed
from dyexport.checkpoints.static import (
    ORDER,
    fill,
    load_backbone,
    meta_backbone,
    open_checkpoint,
    read_order,
    save_static,
    write_config,
)
from dyexport.checkpoints.stored_weights import StoredWeights, View
from dyexport.checkpoints.streaming import meta_parameters, stored_state, stream_routers
from dyexport.checkpoints.structure import DYNAMIC, read_config
from dyexport.checkpoints.weight_checks import check_weights
from dyexport.checkpoints.weight_files import link_weights, write_shards, write_weights
from dyexport.errors import BundleError, CheckpointError, UsageError
from dyexport.lora import LoraSpec
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.hooks import BIAS
from dyexport.models.routers import WIDTH_BIAS, FreeRouter
from dyexport.presets import stored_fields, stored_preset

TD_LORA = "td_lora.safetensors"
PARTS = {"routers": "routers.safetensors", "td_lora": TD_LORA}  # file of each part, by attribute of the dynamic model
TABLE = "widths.safetensors"


def _ascending(budgets: tuple[float, ...]) -> tuple[float, ...]:
    if len(budgets) < 2 or list(budgets) != sorted(set(budgets)) or not 0 < budgets[0] <= budgets[-1] <= 1:
        raise ValueError(f"budgets {list(budgets)} must be two or more in (0, 1], ascending")
    return budgets


class DynamicSpec(Frozen):
    """Contents of ``dynamic.json``: the preset, the shape of the routers, and the budgets of a model for several.

    ``model`` has the fields of a preset that dyexport does not know by name. ``token_router`` is the kind of the token
    routers; None: there are none, or the backbone has one kind only, or the file is older than the choice.
    """

    preset: str
    model: dict[str, Any] | None = None
    heads: PositiveInt
    groups: PositiveInt
    tokens: bool
    router: RouterKind = "free"
    td_lora: LoraSpec | None = None
    token_router: TokenRouterKind | None = None
    budgets: Annotated[tuple[float, ...], AfterValidator(_ascending)] | None = None

    @model_validator(mode="after")
    def _static_is_static(self) -> DynamicSpec:
        if self.router == "static" and (self.tokens or (self.td_lora is not None and self.td_lora.experts > 1)):
            raise ValueError("static widths go with no token routers, and with a TD-LoRA of one expert")
        return self

    @classmethod
    def of(cls, preset: Preset, **routing: Any) -> DynamicSpec:
        """Make the spec of a preset's model."""
        return cls(preset=preset.name, model=stored_fields(preset), **routing)

    def get_preset(self) -> Preset:
        """Return the preset. Raises ``CheckpointError`` and ``UsageError``."""
        return stored_preset(self.preset, self.model)

    def attach(self, backbone: nn.Module, preset: Preset) -> DynamicTransformer:
        """Make a dynamic model of a stock one, with new routers."""
        return DynamicTransformer(
            backbone,
            get_adapter(preset.backbone),
            heads=self.heads,
            groups=self.groups,
            tokens=self.tokens,
            router=self.router,
            td_lora=self.td_lora,
            token_router=self.token_router or preset.token_routers[0],
            budgets=self.budgets or (),
        )


def load_with_routers(source: Path, preset: Preset, *, stream: bool = False) -> DynamicTransformer:
    """Load a model that comes with routers: a dynamic checkpoint, or a published DyDiT file.

    With ``stream`` the weights stay on disk. Raises ``CheckpointError``.
    """
    if source.is_dir():
        model, stored = load_dynamic(source, stream=stream)
        if stored != preset:
            raise CheckpointError(f"{source} is a checkpoint of {stored.name}, not of {preset.name}; leave --model out")
        return model
    checkpoint = open_checkpoint(str(source), preset)
    spec = DynamicSpec.of(preset, heads=preset.heads, groups=preset.heads, tokens=True)
    model = _dynamic(
        load_backbone(checkpoint, preset, stream=stream), preset, spec, {"routers": checkpoint.routers}, stream
    )
    if not any(".heads." in name for name in checkpoint.routers):
        open_widths(model, preset)
    return model


def _dynamic(
    backbone: nn.Module,
    preset: Preset,
    spec: DynamicSpec,
    parts: Mapping[str, Mapping[str, Tensor]],
    stream: bool,
    device: str = "cpu",
) -> DynamicTransformer:
    """Make a dynamic model on ``device``, where its backbone is, and fill its ``parts`` with their weights."""
    with meta_parameters(stream):
        model = spec.attach(backbone, preset)
    if stream:
        stream_routers(model.block_routers, parts["routers"], device)
        if model.td_lora is not None:
            model.td_lora.to_empty(device=device)
    for name, module in model.parts().items():
        fill(module, parts[name])
        if not stream:
            module.to(device)
    return model.eval()


@torch.no_grad()
def open_widths(model: DynamicTransformer, preset: Preset) -> None:
    """Set every head and group on at every t, for a file that has token routers only. A budget may narrow it later."""
    for router in model.block_routers:
        for width in (router.heads, router.groups):
            assert isinstance(width, FreeRouter)
            nn.init.zeros_(width.weight)
            nn.init.constant_(width.bias, WIDTH_BIAS)
    start, end = preset.timestep_range
    heads, groups = (np.ones((1, model.depth, units), dtype=bool) for units in (model.heads, model.groups))
    model.table = WidthTable(grid=np.array([start]), end=end, heads=heads, groups=groups)


def load_dynamic(
    directory: Path, *, stream: bool = False, device: str = "cpu", base: BasePrecision = "fp32"
) -> tuple[DynamicTransformer, Preset]:
    """Load a dynamic checkpoint and its preset, as a ``Placement`` says.

    Raises ``CheckpointError`` naming what does not fit.
    """
    spec = read_spec(directory)
    preset = spec.get_preset()
    backbone: Any = load_placed(str(directory), preset, stream=stream, device=device, base=base)
    with torch.device("meta"):
        expected = spec.attach(meta_backbone(preset, backbone.config), preset).parts()
    parts = {name: StoredWeights(directory / PARTS[name]) for name in expected}
    for name, module in expected.items():
        check_weights(parts[name], module.state_dict(), directory / PARTS[name], preset.name)
    model = _dynamic(backbone, preset, spec, parts, stream, device)
    if (directory / TABLE).is_file():
        model.table = _read_table(directory / TABLE, model)
    if (directory / ORDER).is_file():
        model.order = read_order(directory / ORDER, preset)
    return model, preset


def _read_table(file: Path, model: DynamicTransformer) -> WidthTable:
    try:
        table = WidthTable.load(file)
    except BundleError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    shapes = table.heads.shape[1:], table.groups.shape[1:]
    if shapes != (expected := ((model.depth, model.heads), (model.depth, model.groups))):
        raise CheckpointError(f"{file} has heads and groups of {shapes}; the model has {expected}")
    return table


def read_spec(directory: Path) -> DynamicSpec:
    """Read ``dynamic.json`` and check that it fits its preset. Raises ``CheckpointError``."""
    try:
        spec = DynamicSpec.model_validate_json((directory / DYNAMIC).read_bytes())
        preset = spec.get_preset()
    except ValidationError as error:
        raise CheckpointError(f"{directory / DYNAMIC} is of no dynamic checkpoint: {first_problem(error)}") from error
    except (OSError, CheckpointError, UsageError) as error:
        raise CheckpointError(f"{directory} is not a dynamic checkpoint: {error}") from error
    if spec.token_router not in (None, *preset.token_routers):
        raise CheckpointError(
            f"{directory / DYNAMIC} has {spec.token_router} token routers; {preset.name} has "
            f"{' or '.join(preset.token_routers)} ones"
        )
    if spec.heads != preset.heads or 4 * preset.hidden_size % spec.groups:
        raise CheckpointError(
            f"{directory / DYNAMIC} has {spec.heads} heads and {spec.groups} groups; {preset.name} has {preset.heads} "
            f"heads, and groups that divide {4 * preset.hidden_size} channels"
        )
    return spec


def dynamic_weights(directory: Path) -> Mapping[str, Tensor]:
    """Return all tensors of a dynamic checkpoint, by the names that slices read. Each is read lazily."""
    stored = {
        f"{name}.": StoredWeights(directory / file) for name, file in PARTS.items() if (directory / file).is_file()
    }
    stored[""] = StoredWeights(directory)
    return View({f"{prefix}{name}": (weights, name) for prefix, weights in stored.items() for name in weights})


@torch.no_grad()
def ranked_biases(static: Path, directory: Path) -> dict[str, Tensor]:
    """Return a static model's biases by name, reordered as in a dynamic checkpoint that was made from it.

    ``static`` and ``directory`` are diffusers directories; ranking reorders heads and groups.
    """
    preset = read_spec(directory).get_preset()
    backbone, adapter = meta_backbone(preset, read_config(static, preset)), get_adapter(preset.backbone)
    stored = StoredWeights(static)
    biases = [name for name in backbone.state_dict() if name.endswith(BIAS)]
    backbone.load_state_dict({name: stored[name] for name in biases}, strict=False, assign=True)
    if (directory / ORDER).is_file():
        order = read_order(directory / ORDER, preset)
        for block, (heads, groups) in enumerate(zip(order["heads"], order["groups"], strict=True)):
            adapter.permute_units(backbone, block, heads, groups)
    state = backbone.state_dict()
    return {name: state[name] for name in biases}


def save_dynamic(
    model: DynamicTransformer,
    directory: Path,
    preset: Preset,
    *,
    backbone: Path | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a dynamic checkpoint.

    ``backbone`` is a diffusers directory that already has the model's backbone; the checkpoint links to it. ``weights``
    are written in place of the backbone's, one shard in memory at a time.
    """
    if weights is not None:
        write_config(model.backbone, directory)
        write_shards(weights, directory)
    elif backbone is None:
        save_static(model.backbone, directory)
    else:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(backbone / CONFIG, directory / CONFIG)
        link_weights(backbone, directory)
    for name, module in model.parts().items():
        write_weights(stored_state(module), directory / PARTS[name])
    spec = DynamicSpec.of(
        preset,
        heads=model.heads,
        groups=model.groups,
        tokens=model.has_token_routers,
        router=model.router,
        td_lora=None if model.td_lora is None else model.td_lora.spec,
        token_router=preset.recorded(model.token_router),
        budgets=model.budgets or None,
    )
    (directory / DYNAMIC).write_text(spec.model_dump_json(indent=2, exclude_none=True) + "\n", encoding="utf-8")
    if model.table is not None:
        model.table.save(directory / TABLE)
    if model.order is not None:
        save_file(dict(model.order), directory / ORDER)
