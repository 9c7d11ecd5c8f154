"""Loading of a stock module for fine-tuning: onto its device, with one block in host memory at a time.

Weights are reordered before they are stored in fewer bits: values that share a scale in nf4 must be those that shared
one in training.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dyexport.backbones import get_adapter
from dyexport.backbones.base import Preset
from dyexport.backbones.recipe import BasePrecision
from dyexport.checkpoints.static import open_checkpoint
from dyexport.checkpoints.streaming import empty_backbone
from dyexport.models.frozen_base import lower_block
from dyexport.progress import Progress, no_progress


class BlockLoader:
    """Loader of a stock module. ``backbone`` is on the meta device until ``load``, so that hooks can be attached first.

    Raises ``CheckpointError``.
    """

    def __init__(self, source: str, preset: Preset) -> None:
        checkpoint = open_checkpoint(source, preset)
        self.weights = checkpoint.weights
        self.adapter = get_adapter(preset.backbone)
        self.backbone = empty_backbone(self.adapter, checkpoint.config, checkpoint.weights).eval()

    @torch.no_grad()
    def load(
        self,
        precision: BasePrecision,
        device: torch.device | str,
        order: Mapping[str, Tensor] | None = None,
        progress: Progress = no_progress,
    ) -> None:
        """Load the weights onto ``device``: those of the blocks' frozen linear layers in ``precision``, others in fp32.

        ``order``, ``heads`` (L, H) and ``groups`` (L, G), is the new order of the units of every block.
        """
        names = {module: name for name, module in self.backbone.named_modules()}
        blocks = self.adapter.blocks(self.backbone)
        for index, block in enumerate(blocks):
            progress(index, len(blocks))
            self._read(block, names)
            if order is not None:
                self.adapter.permute_units(self.backbone, index, order["heads"][index], order["groups"][index])
            lower_block(block, precision, device)
            block.to(device)
        self._read(self.backbone, names)
        self.backbone.to(device)
        progress(len(blocks), len(blocks))

    def _read(self, module: nn.Module, names: dict[nn.Module, str]) -> None:
        """Read the parameters of the modules in ``names``, and remove these; blocks may share some."""
        for child in module.modules():
            if (name := names.pop(child, None)) is None:
                continue
            for leaf, parameter in list(child.named_parameters(recurse=False)):
                value = torch.empty(parameter.shape, dtype=parameter.dtype)
                value.copy_(self.weights[f"{name}.{leaf}" if name else leaf])
                setattr(child, leaf, nn.Parameter(value, requires_grad=parameter.requires_grad))


def load_frozen(source: str, preset: Preset, precision: BasePrecision, device: torch.device | str) -> nn.Module:
    """Load a stock module that is not trained, as ``BlockLoader.load`` does.

    One thread at a time: accelerate changes ``nn.Module`` while the module is made. Raises ``CheckpointError``.
    """
    loader = BlockLoader(source, preset)
    loader.backbone.requires_grad_(False)
    loader.load(precision, device)
    return loader.backbone
