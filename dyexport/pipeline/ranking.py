"""Ranking of units before fine-tuning: importance in the dense model, kept pass by pass for a run that is killed.

On a GPU the model is ranked there, with its base stored as in training, and products in bf16 for a base in lower
precision. On a CPU it is ranked in fp32, and a model larger than memory is streamed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dyexport.backbones import get_adapter
from dyexport.backbones.recipe import BasePrecision
from dyexport.calibration.widths import trajectory_points
from dyexport.checkpoints.blockwise import load_frozen
from dyexport.checkpoints.static import load_static
from dyexport.checkpoints.streaming import must_stream
from dyexport.models.devices import best_device, bf16_products
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.importance import importance_by_pass, order_of
from dyexport.pipeline.calibration_inputs import calibration_inputs
from dyexport.pipeline.settings import BuildSettings
from dyexport.progress import Progress, no_progress
from dyexport.stages.ledger import ProcessGroup
from dyexport.training.data import LatentSource
from dyexport.training.processes import agreed
from dyexport.training.state import SavedState, load_state, save_state

RANKING_POINTS = 8
RANKING = "ranking.safetensors"  # importance at the timesteps that are done


@dataclass(frozen=True, kw_only=True)
class UnitRanking:
    """Ranking of the static model's units by importance.

    Importance is kept in ``file`` as that of ``origin``, a hash of what it depends on. A GPU does not give the same
    bits in every run, and a resumed run must have the order that it began with.
    """

    settings: BuildSettings
    static: Path
    source: LatentSource | None
    file: Path
    origin: str
    group: ProcessGroup
    progress: Progress = no_progress

    def order(self) -> dict[str, Tensor]:
        """Return the new order of units, as ``order_of`` does. The main process ranks them, and the others wait."""
        order: dict[str, Tensor] = {}
        if self.group.is_main_process:
            state = load_state(self.file, self.origin)
            if state is None or state.step < RANKING_POINTS:
                state = self._measure(state)
            order = order_of(state.tensors["heads"].numpy(), state.tensors["groups"].numpy())
        return agreed(order)

    def _measure(self, state: SavedState | None) -> SavedState:
        """Measure importance at the timesteps that ``state`` lacks, and save the state after every pass."""
        device = best_device()
        precision = self.settings.frozen_precision if device != "cpu" else "fp32"
        model = dense_model(self.settings, self.static, precision, device)
        inputs = calibration_inputs(self.settings, self.source)
        points = trajectory_points(inputs.preset.timestep_range, RANKING_POINTS).tolist()
        done, tensors = (0, {}) if state is None else state
        with bf16_products(torch.device(device), enabled=precision != "fp32"):
            for heads, groups in importance_by_pass(model, inputs, points, progress=self.progress, done=done):
                new = {"heads": heads, "groups": groups}  # (T', L, H), (T', L, G)
                tensors = {name: torch.cat([tensors[name], new[name]]) if tensors else new[name] for name in new}
                state = SavedState(len(tensors["heads"]), tensors)
                save_state(self.file, state, self.origin)
        assert state is not None
        return state


def dense_model(settings: BuildSettings, static: Path, precision: BasePrecision, device: str) -> DynamicTransformer:
    """Load the static model with gates, its base stored in ``precision``. On a CPU it is streamed if it must be."""
    preset = settings.preset
    if device == "cpu" and must_stream(preset.parameters, settings.memory):
        backbone = load_static(str(static), preset, stream=True)
    else:
        backbone = load_frozen(str(static), preset, precision, device)
    return DynamicTransformer(backbone, get_adapter(preset.backbone), heads=preset.heads, tokens=False)
