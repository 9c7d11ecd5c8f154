"""Stock pipelines whose transformer takes more channels than it predicts: Control and Fill."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxControlPipeline, FluxFillPipeline, FluxPipeline

import dyexport
from dyexport.backbones.flux.preset import FluxPreset
from tests.pipeline.tiny import build, shallow, tiny_settings
from tests.pipeline.tiny_pipeline import save_pipeline
from tests.runtime.masked import Masked


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


IMAGE = torch.rand(1, 3, 64, 64, generator=noise(0))
MASK = torch.rand(1, 1, 64, 64, generator=noise(1)).round()
LATENTS, MASKS = 16, 4 * 8**2  # channels of a token: of packed latents, and of a mask packed to the VAE's scale of 8
CALLS: dict[type[DiffusionPipeline], tuple[int, dict[str, Any]]] = {
    FluxControlPipeline: (LATENTS, {"control_image": IMAGE}),
    FluxFillPipeline: (LATENTS + MASKS, {"image": IMAGE, "mask_image": MASK}),
}


@pytest.mark.parametrize("kind", CALLS, ids=lambda kind: kind.__name__)
def test_a_stock_pipeline_edits_as_around_the_masked_model(kind: type[DiffusionPipeline], tmp_path: Path) -> None:
    context, call = CALLS[kind]
    tiny = shallow("flux-tiny")
    assert isinstance(tiny, FluxPreset)
    preset = replace(tiny, name="edit", in_channels=LATENTS + context, context_channels=context)
    bundle = build(tiny_settings(tmp_path, model=preset, engines=2))
    base = FluxPipeline.from_pretrained(save_pipeline(tmp_path / "pipeline"))
    unused = ("transformer", "image_encoder", "feature_extractor")
    parts = {name: part for name, part in base.components.items() if name not in unused}

    def draw(transformer: Any) -> torch.Tensor:
        pipe: Any = kind(**parts, transformer=transformer)
        pipe.set_progress_bar_config(disable=True)
        size = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "pt"}
        drawn: torch.Tensor = pipe(prompt="a cat", **size, generator=noise(0), **call).images
        return drawn

    drawn = draw(dyexport.load(bundle.root))
    np.testing.assert_allclose(drawn, draw(Masked(bundle.root, torch.float32)), atol=1e-4)
