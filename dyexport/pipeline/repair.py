"""The reference of a model that is cut without training: its output projections are repaired."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from dyexport.bundle.tables import UnitOrder
from dyexport.calibration.repair import fit_projections
from dyexport.calibration.widths import trajectory_points
from dyexport.checkpoints.dynamic import save_dynamic
from dyexport.checkpoints.stored_weights import StoredWeights
from dyexport.checkpoints.structure import read_config
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.inputs import NoisedInputs
from dyexport.pipeline.settings import BuildSettings
from dyexport.progress import Progress
from dyexport.slicing.slicer import SliceContext, cut_inputs, spec_of

CHANGES = "changes"  # folder of what is added to the weights, one file per linear, while they are written


def save_repaired(
    settings: BuildSettings,
    model: DynamicTransformer,
    dynamic: Path,
    inputs: NoisedInputs,
    progress: Progress,
    out: Path,
) -> None:
    """Write ``model``, whose width table is set, with repaired output projections; ``dynamic`` has its weights.

    Weights are in memory one layer at a time, so that models larger than memory are repaired too.
    """
    preset, table = settings.preset, model.table
    assert table is not None
    spec = spec_of(preset, read_config(dynamic, preset))
    names = cut_inputs(SliceContext.of(spec, table, None), UnitOrder.of(table))
    points = trajectory_points(preset.timestep_range, settings.recipe.calibration.importance).tolist()
    folder = out / CHANGES
    folder.mkdir(parents=True)

    def change(name: str, weight: Tensor, bias: Tensor) -> None:
        save_file({f"{name}.weight": weight.contiguous(), f"{name}.bias": bias}, folder / f"{name}.safetensors")

    rows = settings.recipe.calibration.repair
    fit_projections(model, names, inputs, points, change, rows_per_input=rows, progress=progress)
    save_dynamic(model, out, preset, weights=Repaired(StoredWeights(dynamic), folder, names))
    shutil.rmtree(folder)


class Repaired(Mapping[str, Tensor]):
    """The weights of a backbone with the changes of some linears added, each read lazily, in the dtype it has."""

    def __init__(self, weights: Mapping[str, Tensor], folder: Path, names: tuple[str, ...]) -> None:
        self.weights = weights
        self.files = {f"{name}.{kind}": folder / f"{name}.safetensors" for name in names for kind in ("weight", "bias")}

    def __getitem__(self, name: str) -> Tensor:
        weight = self.weights[name]
        if name not in self.files:
            return weight
        return (weight.float() + StoredWeights(self.files[name])[name]).to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)
