"""diffusers' stock pipelines draw around a bundle what they draw around the masked model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

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
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImagePipeline,
)

import dyexport
from dyexport.backbones.sampling import dtype_argument
from dyexport.errors import EngineMismatchError
from dyexport.runtime.transformer import BundleTransformer
from tests.runtime.conftest import Saved
from tests.runtime.masked import Masked

pytestmark = pytest.mark.build  # its bundles are asked for by names that are computed


@cache
def image(seed: int) -> torch.Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


SIZE = {"height": 64, "width": 64}
FLUX = {"prompt": "a cat", **SIZE, "num_inference_steps": 2, "output_type": "pt"}
QWEN = {"prompt": "a cat", "negative_prompt": " ", **SIZE, "num_inference_steps": 3, "output_type": "pt"}
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
    QwenImagePipeline: lambda: {**QWEN, "prompt": ["a cat", "a large dog"], "negative_prompt": [" ", "not a dog"]},
    QwenImageImg2ImgPipeline: lambda: {**QWEN, "image": image(0), "strength": 0.7},
    QwenImageInpaintPipeline: lambda: {**QWEN, "image": image(0), "mask_image": image(1)[:, :1].round()},
}
BASES = {"flux": FluxPipeline, "dit": DiTPipeline, "latte": LattePipeline, "qwenimage": QwenImagePipeline}


def backbone_of(kind: type[DiffusionPipeline]) -> str:
    return next(name for name in BASES if name in kind.__name__.lower())


def draw(pipe: DiffusionPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    output = pipe(**CALLS[type(pipe)](), generator=torch.Generator().manual_seed(0))
    drawn = output.frames if isinstance(pipe, LattePipeline) else output.images
    return torch.as_tensor(drawn).float()


def open_base(saved: Saved, kind: type[DiffusionPipeline], dtype: torch.dtype) -> DiffusionPipeline:
    transformer = dyexport.load(saved.bundle).to(dtype)
    return kind.from_pretrained(saved.pipeline, transformer=transformer, **dtype_argument(dtype))


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


def test_dit_draws_in_half_precision(dit: Saved) -> None:
    """Its pipeline takes the dtype of latents from the transformer, and gives them to the VAE as they are."""
    pipe = DiTPipeline.from_pretrained(dit.pipeline, **dtype_argument(torch.float16))
    pipe.transformer = dyexport.load(dit.bundle, dtype=torch.float16)
    drawn = draw(pipe)
    pipe.transformer = Masked(dit.bundle, torch.float16)
    np.testing.assert_allclose(drawn, draw(pipe), atol=0.01)


def test_a_pipeline_is_made_from_another(saved: Saved, kind: type[DiffusionPipeline]) -> None:
    """The base pipeline's bundle, not a copy, in fp32 again as ``from_pipe`` has it, and then in bf16."""
    base = open_base(saved, BASES[backbone_of(kind)], torch.bfloat16)
    for dtype in TOLERANCE:
        pipe = kind.from_pipe(base, **dtype_argument(dtype))
        assert pipe.transformer is base.transformer
        assert pipe.transformer.dtype == dtype
        drawn = draw(pipe)
        pipe.transformer = Masked(saved.bundle, dtype)
        np.testing.assert_allclose(drawn, draw(pipe), atol=TOLERANCE[dtype])


def test_a_pipeline_is_cast_as_a_whole(saved: Saved, kind: type[DiffusionPipeline]) -> None:
    pipe = open_base(saved, kind, torch.float32)
    drawn = draw(pipe.to(torch.bfloat16))
    assert pipe.transformer.dtype == torch.bfloat16
    opened = open_base(saved, kind, torch.bfloat16).to(torch.bfloat16)  # casts tables of text encoders, as above
    np.testing.assert_allclose(drawn, draw(opened), atol=1e-6)


@pytest.mark.parametrize("kind", BASES.values(), ids=lambda kind: kind.__name__, indirect=True)
def test_a_saved_pipeline_opens_with_its_bundle(saved: Saved, kind: type[DiffusionPipeline], tmp_path: Path) -> None:
    pipe = open_base(saved, kind, torch.float32)
    pipe.save_pretrained(tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert isinstance(again, kind)
    assert isinstance(again.transformer, BundleTransformer)
    assert type(again.transformer) is type(pipe.transformer)
    np.testing.assert_array_equal(draw(again), draw(pipe))
    cast = DiffusionPipeline.from_pretrained(tmp_path / "saved", **dtype_argument(torch.bfloat16))
    assert cast.transformer.dtype == torch.bfloat16


def load_ip_adapter(pipe: Any) -> None:
    adapter = {"image_proj": {"proj.weight": torch.ones(4, 4)}, "ip_adapter": {"0.to_k_ip.weight": torch.ones(4, 4)}}
    pipe.load_ip_adapter(adapter, weight_name="", image_encoder_pretrained_model_name_or_path=None)


LORA = {"transformer.x_embedder.lora_A.weight": (2, 16), "transformer.x_embedder.lora_B.weight": (32, 2)}


@pytest.mark.parametrize(
    ("call", "cure"),
    [
        (lambda pipe: pipe.load_lora_weights({key: torch.ones(shape) for key, shape in LORA.items()}), "--lora"),
        (lambda pipe: pipe.fuse_lora(), "--lora"),
        (lambda pipe: pipe.unload_lora_weights(), "--lora"),
        (lambda pipe: pipe.disable_lora(), "--lora"),
        (load_ip_adapter, "diffusers transformer"),
        (lambda pipe: pipe.transformer.enable_cache(None), "diffusers transformer"),
    ],
)
def test_a_pipelines_methods_on_layers_are_refused_in_one_sentence(
    flux: Saved, call: Callable[[Any], object], cure: str
) -> None:
    pipe = open_base(flux, FluxPipeline, torch.float32)
    with pytest.raises(EngineMismatchError, match=f"inside engines; .*{cure}"):
        call(pipe)


def test_what_pipelines_pass_for_a_lora_of_full_strength_is_taken(flux: Saved) -> None:
    pipe = open_base(flux, FluxPipeline, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    drawn, scaled = (
        pipe(**FLUX, generator=torch.Generator().manual_seed(0), joint_attention_kwargs=given).images
        for given in (None, {"scale": 1.0})
    )
    assert torch.equal(drawn, scaled)
