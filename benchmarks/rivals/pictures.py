"""Pictures of the dense network and of dynamic ones from the same noise and labels, in alternating rows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import torch
from PIL import Image

from benchmarks.rivals.measure import Models, timed_name
from benchmarks.rivals.variants import DYNAMIC, Variant
from dyexport.backbones import get_pipeline
from dyexport.bench.case import has_dense
from dyexport.bench.pictures import grid, zoom_for
from dyexport.runtime.loading import load
from dyexport.runtime.sampling import sample

ROWS = 2  # of every network
SEED = 1  # of the noise
TARGET = "onnx"


def pictures_of(models: Models, variants: Sequence[Variant], seeds: Sequence[int]) -> tuple[Image.Image, str] | None:
    """Return a sheet of samples and a caption: one row of classes for each network, ``ROWS`` times.

    Networks are the dense one and those of dynamic widths of the first seed, in the order of ``variants``, sampled
    with the model's own steps and guidance. None where samples are no pictures, or where a network is missing.
    """
    names = {each.budget: timed_name(each.folder, seeds[0]) for each in variants if each.name == DYNAMIC}
    bundles = [models.bundles[name] for name in names.values() if name in models.bundles]
    if not bundles or not bundles[0].manifest.model.pixel_space or not has_dense(bundles[0], TARGET):
        return None
    spec = bundles[0].manifest.model
    defaults = get_pipeline(spec.backbone).defaults(spec)
    sheets = []
    for bundle, dense in [(bundles[0], True), *((each, False) for each in bundles)]:
        with closing(load(bundle.root, device="cpu", check_hashes=False, dense=dense)) as network:
            sheets.append(sample(network, spec, [*range(spec.classes)] * ROWS, seed=SEED))  # (ROWS * classes, C, H, W)
    rows = [sheet[row * spec.classes :][: spec.classes] for row in range(ROWS) for sheet in sheets]
    budgets = ", then ".join(f"lambda {budget:g}" for budget, name in names.items() if name in models.bundles)
    caption = (
        f"Rows in turn: dense, then dynamic at {budgets}; the same noise and labels, "
        f"{defaults.steps} steps, guidance {defaults.guidance:g}."
    )
    return grid(torch.cat(rows).numpy(), spec.classes, zoom=zoom_for(spec.latent_shape[1])), caption
