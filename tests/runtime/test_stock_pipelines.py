"""diffusers' stock pipelines draw around a bundle what they draw around the masked model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    DiTPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    LattePipeline,
)

import dyexport
from dyexport.build.verify import find_reference
from dyexport.bundle import Bundle
from dyexport.models.dynamic_checkpoints import load_dynamic
from dyexport.runtime.component import BundleTransformer
from tests.runtime.conftest import Saved


class Masked(torch.nn.Module):
    """The masked model in fp32 with a stock module's signature, in a pipeline of any dtype."""

    def __init__(self, bundle: Path, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, _ = load_dynamic(find_reference(Bundle.open(bundle)))
        self.config, self.dtype, self.device = self.model.config, dtype, torch.device("cpu")

    def forward(self, hidden_states: torch.Tensor, *, return_dict: bool = True, **inputs: Any) -> Any:
        given = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        given = {name: value.float() if value.is_floating_point() else value for name, value in given.items()}
        if "class_labels" in given:
            given["class_labels"] = given["class_labels"].clamp(max=self.config.num_embeds_ada_norm)
        sample = self.model({"hidden_states": hidden_states.float(), **given}).sample.to(hidden_states.dtype)
        return Output(sample) if return_dict else (sample,)

    def cache_context(self, name: str) -> Any:
        return torch.no_grad()


class Output(NamedTuple):
    sample: torch.Tensor


@cache
def image(seed: int) -> torch.Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


SIZE = {"height": 64, "width": 64}
FLUX = {"prompt": "a cat", **SIZE, "num_inference_steps": 2, "output_type": "pt"}
CALLS: dict[type[DiffusionPipeline], Callable[[], dict[str, Any]]] = {
    FluxPipeline: lambda: FLUX,
    FluxImg2ImgPipeline: lambda: {**FLUX, "num_inference_steps": 3, "image": image(0), "strength": 0.7},
    FluxInpaintPipeline: lambda: {**FLUX, "image": image(0), "mask_image": image(1)[:, :1].round(), "strength": 1.0},
    FluxKontextPipeline: lambda: {**FLUX, "image": image(0), "max_area": 64 * 64, "_auto_resize": False},
    DiTPipeline: lambda: {"class_labels": [3, 7], "num_inference_steps": 3, "output_type": "pt"},
    LattePipeline: lambda: {
        "prompt": "a cat",
        "video_length": 4,
        "height": 32,
        "width": 32,
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "output_type": "pt",
    },
}
BASES = {"flux": FluxPipeline, "dit": DiTPipeline, "latte": LattePipeline}


def backbone_of(kind: type[DiffusionPipeline]) -> str:
    return next(name for name in BASES if name in kind.__name__.lower())


def draw(pipe: DiffusionPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    output = pipe(**CALLS[type(pipe)](), generator=torch.Generator().manual_seed(0))
    drawn = output.frames if isinstance(pipe, LattePipeline) else output.images
    return torch.as_tensor(drawn).float()


def open_base(saved: Saved, kind: type[DiffusionPipeline], dtype: torch.dtype) -> DiffusionPipeline:
    transformer = dyexport.load(saved.bundle, dtype=dtype)
    return kind.from_pretrained(saved.pipeline, transformer=transformer, torch_dtype=dtype)


@pytest.fixture(params=CALLS, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> type[DiffusionPipeline]:
    found: type[DiffusionPipeline] = request.param
    return found


@pytest.fixture
def saved(kind: type[DiffusionPipeline], request: pytest.FixtureRequest) -> Saved:
    found: Saved = request.getfixturevalue(backbone_of(kind))
    return found


# Rounding differs where two numbers of fp32 fall on two sides of a step of the coarser format.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_stock_pipeline_draws_what_the_masked_model_draws(
    saved: Saved, kind: type[DiffusionPipeline], dtype: torch.dtype
) -> None:
    pipe = open_base(saved, kind, dtype)
    drawn = draw(pipe)
    pipe.transformer = Masked(saved.bundle, dtype)
    np.testing.assert_allclose(drawn, draw(pipe), atol=TOLERANCE[dtype])


def test_a_pipeline_is_made_from_another(saved: Saved, kind: type[DiffusionPipeline]) -> None:
    """The base pipeline's bundle, not a copy, in fp32 again as ``from_pipe`` has it, and then in bf16."""
    base = open_base(saved, BASES[backbone_of(kind)], torch.bfloat16)
    for dtype in TOLERANCE:
        pipe = kind.from_pipe(base, torch_dtype=dtype)
        assert pipe.transformer is base.transformer
        assert pipe.transformer.dtype == dtype
        drawn = draw(pipe)
        pipe.transformer = Masked(saved.bundle, dtype)
        np.testing.assert_allclose(drawn, draw(pipe), atol=TOLERANCE[dtype])


def test_a_pipeline_is_cast_as_a_whole(saved: Saved, kind: type[DiffusionPipeline]) -> None:
    pipe = open_base(saved, kind, torch.float32)
    drawn = draw(pipe.to(torch.bfloat16))
    assert pipe.transformer.dtype == torch.bfloat16
    np.testing.assert_allclose(drawn, draw(open_base(saved, kind, torch.bfloat16)), atol=1e-6)


@pytest.mark.parametrize("kind", BASES.values(), ids=lambda kind: kind.__name__, indirect=True)
def test_a_saved_pipeline_opens_with_its_bundle(saved: Saved, kind: type[DiffusionPipeline], tmp_path: Path) -> None:
    pipe = open_base(saved, kind, torch.float32)
    pipe.save_pretrained(tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert isinstance(again, kind)
    assert isinstance(again.transformer, BundleTransformer)
    assert type(again.transformer) is type(pipe.transformer)
    np.testing.assert_array_equal(draw(again), draw(pipe))
    cast = DiffusionPipeline.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    assert cast.transformer.dtype == torch.bfloat16
