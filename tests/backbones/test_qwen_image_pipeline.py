"""Qwen-Image from prompts: in diffusers' pipeline, on the command line, and for data that the model makes itself."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from dyexport.bundle.reader import Bundle
from dyexport.cli import main
from dyexport.errors import DataError, UsageError
from dyexport.models.random_weights import random_backbone
from dyexport.presets import PRESETS
from dyexport.runtime.loading import load
from dyexport.runtime.prompt_settings import Prompts
from dyexport.runtime.prompts import sample_prompts
from dyexport.serving.config import ServedModelConfig
from dyexport.serving.requests import Request
from dyexport.serving.samplers import open_sampler
from dyexport.serving.triton_repository import Deployment, deploy
from dyexport.training.prompts import embed_prompts
from dyexport.training.randomness import step_generator
from dyexport.training.synthetic import SyntheticConfig, generate
from tests.pipeline.tiny_pipeline import save_qwen_image_pipeline
from tests.runtime.masked import Masked

PRESET = PRESETS["qwen-image-tiny"]


@pytest.fixture(scope="module")
def built(qwen_image_tiny: Bundle) -> Bundle:
    return qwen_image_tiny


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen_image_pipeline(tmp_path_factory.mktemp("pipeline"))


def embedded(*lengths: int, words: int, name: str = "prompt_embeds") -> dict[str, torch.Tensor]:
    """Random prompts of these lengths, padded to a number of tokens."""
    mask = (torch.arange(words) < torch.tensor(lengths).unsqueeze(1)).long()  # as the pipeline's own
    draw = torch.Generator().manual_seed(words)
    return {name: torch.randn(len(lengths), words, 64, generator=draw) * mask.unsqueeze(2), f"{name}_mask": mask}


def guided() -> dict[str, torch.Tensor]:
    """Two prompts of different lengths, and the negative prompts of both, which need no padding."""
    return {**embedded(7, 4, words=7), **embedded(3, 3, words=3, name="negative_prompt_embeds")}


def bare(transformer: Any) -> QwenImagePipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(**PRESET.sampling.scheduler)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    pipe = QwenImagePipeline(scheduler=scheduler, transformer=transformer, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("height", "width", "steps", "scale"), [(256, 320, 6, 4.0), (64, 512, 3, 1.0)])
def test_one_bundle_serves_any_resolution_steps_and_guidance(
    built: Bundle, height: int, width: int, steps: int, scale: float
) -> None:
    sizes = {"height": height, "width": width, "num_inference_steps": steps, "true_cfg_scale": scale}
    drawn, truth = (
        bare(transformer)(
            **guided(), **sizes, output_type="latent", generator=torch.Generator().manual_seed(1)
        ).images.float()
        for transformer in (load(built.root), Masked(built.root))
    )
    assert drawn.shape == (2, height * width // 256, 16)
    np.testing.assert_allclose(drawn, truth, atol=1e-3)  # rounding, carried through all steps


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object, code: int = 0) -> None:
    monkeypatch.setattr(sys, "argv", ["dyexport", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == code


def test_embedded_prompts_need_no_text_encoder(
    built: Bundle, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(guided(), tmp_path / "prompts.safetensors")
    size = ["--steps", 2, "--height", 64, "--width", 64]
    asked = ["sample", built.root, "--prompt-embeds", tmp_path / "prompts.safetensors", *size]
    run(monkeypatch, *asked, "-o", tmp_path / "x.safetensors")
    latents = load_file(tmp_path / "x.safetensors")["latents"]
    truth = bare(Masked(built.root))(
        **guided(), height=64, width=64, num_inference_steps=2, output_type="latent", generator=torch.manual_seed(0)
    ).images
    np.testing.assert_allclose(latents, truth, atol=1e-4)
    run(monkeypatch, *asked, "-o", tmp_path / "y.png", "--vae", pipeline / "vae")
    assert Image.open(tmp_path / "y.png").size == (134, 68)


def test_prompts_of_different_lengths_are_sampled_in_one_batch(built: Bundle, pipeline: Path) -> None:
    transformer, texts = load(built.root), ("a cat", "a very large dog")
    settings = {"pipeline": str(pipeline), "steps": 2, "height": 64, "width": 64}
    together = sample_prompts(transformer, Prompts(texts=texts, seed=(0, 1), **settings)).values
    for row, text in enumerate(texts):
        alone = sample_prompts(transformer, Prompts(texts=(text,), seed=(row,), **settings)).values
        np.testing.assert_allclose(together[row : row + 1], alone, atol=0.02)  # in bf16 between the steps
    plain = sample_prompts(transformer, Prompts(texts=texts, seed=(0, 1), guidance=1.0, **settings)).values
    assert not np.allclose(together, plain, atol=0.02)


def test_a_server_samples_pictures_from_prompts(built: Bundle, pipeline: Path, tmp_path: Path) -> None:
    deployment = Deployment(bundle=built.root, repository=tmp_path, name="qwen", pipeline=str(pipeline), max_batch=2)
    sampler = open_sampler(deploy(deployment) / "1", ServedModelConfig(pipeline="pipeline"), "cpu")
    defaults = sampler.parser.defaults
    assert (defaults.steps, defaults.guidance, defaults.height) == (50, 4.0, 1024)
    settings = replace(defaults, steps=2, height=64, width=64)
    requests = [
        Request(labels_or_prompts=(text,), seeds=(seed,), settings=settings)
        for seed, text in enumerate(("a cat", "a very large dog"))
    ]
    pictures = sampler.sample(requests, lambda: None)
    assert (pictures.shape, pictures.dtype) == ((2, 64, 64, 3), np.uint8)
    assert np.abs(pictures[1:].astype(int) - sampler.sample(requests[1:], lambda: None)).max() <= 5  # bf16 latents


def test_guidance_needs_negative_prompts(built: Bundle, tmp_path: Path) -> None:
    save_file(embedded(7, 4, words=7), tmp_path / "prompts.safetensors")
    asked = {"embedded": tmp_path / "prompts.safetensors", "steps": 2, "height": 64, "width": 64}
    with pytest.raises(DataError, match="lacks negative_prompt_embeds"):
        sample_prompts(load(built.root), Prompts(**asked))
    assert sample_prompts(load(built.root), Prompts(**asked, guidance=1.0)).values.shape == (2, 16, 16)
    with pytest.raises(UsageError, match="--frames"):
        sample_prompts(load(built.root), Prompts(**asked, frames=4))


def test_prompts_are_embedded_with_their_masks(pipeline: Path) -> None:
    """Padded to the length that data has; the last is the unconditional one."""
    conditions = embed_prompts(str(pipeline), ("a cat", "a large dog"), PRESET)
    text, mask = conditions["encoder_hidden_states"], conditions["encoder_hidden_states_mask"]
    assert text.shape == (3, PRESET.text_tokens, 64)
    assert mask.shape == (3, PRESET.text_tokens)
    assert text[mask == 0].count_nonzero() == 0


def test_synthetic_data_is_sampled_as_the_pipeline_samples(tmp_path: Path) -> None:
    backbone = random_backbone(PRESET)
    prompts = embedded(9, 5, 2, words=PRESET.text_tokens)  # the last is the unconditional one
    conditions = {
        "encoder_hidden_states": prompts["prompt_embeds"],
        "encoder_hidden_states_mask": prompts["prompt_embeds_mask"].float(),
    }
    config = SyntheticConfig(samples=2, steps=3, guidance=3.0)
    generate(backbone, PRESET, config, tmp_path, prompts=conditions)
    (file,) = tmp_path.glob("*.safetensors")
    stored = load_file(file)
    noise = torch.randn(2, *PRESET.latent_shape, generator=step_generator(config.seed, 0, "noise"))
    negative = {f"negative_{name}": value[-1:].expand(2, *value.shape[1:]) for name, value in prompts.items()}
    expected = bare(backbone)(
        **{name: value[:2] for name, value in prompts.items()},
        **negative,
        true_cfg_scale=3.0,
        latents=noise,
        height=128,
        width=128,
        num_inference_steps=3,
        output_type="latent",
    ).images
    torch.testing.assert_close(stored["latents"], expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(stored["prompt_embeds_mask"], conditions["encoder_hidden_states_mask"][:2])
