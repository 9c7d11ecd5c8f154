"""FLUX end to end: one bundle against the masked model, in the stock pipeline, at several resolutions and lengths."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from PIL import Image
from safetensors.torch import load_file, save_file

from dyexport.backbones.flux.preset import FluxPreset
from dyexport.backbones.flux.stand_in import FluxBundle
from dyexport.bundle.reader import Bundle
from dyexport.bundle.spec import TokenRouterKind
from dyexport.checkpoints.dynamic import load_dynamic
from dyexport.cli import main
from dyexport.errors import CheckpointError, DataError, DyexportError, EngineMismatchError, UsageError
from dyexport.runtime.loading import load
from dyexport.runtime.prompt_settings import Prompts
from dyexport.runtime.prompts import sample_prompts
from dyexport.verification.settings import VerifySettings
from dyexport.verification.verify import find_reference, verify_bundle
from tests.pipeline.tiny import build, shallow, tiny_settings
from tests.pipeline.tiny_pipeline import save_pipeline
from tests.verification.test_layers import assert_every_layer_agrees


@pytest.fixture(scope="module")
def built(flux_tiny: Bundle) -> Bundle:
    return flux_tiny


@pytest.fixture(scope="module")
def loaded(built: Bundle) -> FluxBundle:
    transformer = load(built.root, check_hashes=False)
    assert isinstance(transformer, FluxBundle)
    return transformer


def test_every_layer_agrees(built: Bundle) -> None:
    assert_every_layer_agrees(built)


class Masked(torch.nn.Module):
    """The masked model with the stock module's signature."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self.model, _ = load_dynamic(find_reference(bundle))
        self.config, self.dtype, self.device = self.model.config, torch.float32, torch.device("cpu")

    def forward(self, *, return_dict: bool, joint_attention_kwargs: None, **inputs: torch.Tensor) -> Any:
        assert not return_dict
        sample = self.model(inputs).sample
        return (sample,)

    def cache_context(self, name: str) -> Any:
        return FluxBundle.cache_context(self, name)  # type: ignore[arg-type]


def picture(transformer: Any, *, pixels: int, steps: int, words: int, negative: bool = False) -> torch.Tensor:
    """Packed latents from diffusers' own pipeline, its resolution-dependent shift of sigma included."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = FluxPipeline(
        scheduler=scheduler,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(3)
    prompts = {"prompt_embeds": (1, words, 64), "pooled_prompt_embeds": (1, 32)}
    if negative:
        prompts |= {f"negative_{name}": shape for name, shape in prompts.items()}
    embedded = {name: torch.randn(shape, generator=draw) for name, shape in prompts.items()}
    return pipe(
        **embedded,
        true_cfg_scale=2.0 if negative else 1.0,
        height=pixels,
        width=pixels,
        num_inference_steps=steps,
        generator=draw,
        output_type="latent",
    ).images


def test_equals_the_masked_model(built: Bundle) -> None:
    report = verify_bundle(built.root, VerifySettings(timesteps=16))
    assert report.passed
    assert report.max_abs_error < 2e-5
    assert all(segment.compared for segment in report.segments)


def test_equals_the_masked_model_on_small_pictures(built: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FluxPreset, "for_noise", lambda preset: replace(preset, side=3, text_tokens=5))
    usual, small = (verify_bundle(built.root, VerifySettings(timesteps=4, small=small)) for small in (False, True))
    assert usual.passed
    assert small.passed
    assert small.relative_error != usual.relative_error, "the largest error is a few steps of fp32 in both"


@pytest.mark.parametrize(("path", "kind"), [("capacity", "published"), ("dynamic", "compact")])
def test_room_for_tokens(tmp_path: Path, path: str, kind: TokenRouterKind) -> None:
    settings = tiny_settings(tmp_path, model=shallow("flux-tiny"), token_path=path, token_router=kind)
    bundle = build(settings)
    assert bundle.manifest.model.token_router == kind
    assert load_dynamic(find_reference(bundle))[0].token_router == kind
    report = verify_bundle(bundle.root, VerifySettings(timesteps=16))
    assert report.passed
    assert report.max_abs_error is not None
    assert report.max_abs_error < 2e-5
    assert all(segment.compared for segment in report.segments)


@pytest.mark.parametrize(("pixels", "steps", "words"), [(512, 12, 16), (768, 6, 7), (1024, 2, 16)])
def test_one_bundle_serves_any_resolution_steps_and_prompt(
    built: Bundle, loaded: FluxBundle, pixels: int, steps: int, words: int
) -> None:
    drawn = picture(loaded, pixels=pixels, steps=steps, words=words)
    truth = picture(Masked(built), pixels=pixels, steps=steps, words=words)
    assert drawn.shape == (1, (pixels // 16) ** 2, 16)
    np.testing.assert_allclose(drawn, truth, atol=1e-3)  # rounding, carried through all steps


def test_guidance_in_two_calls(built: Bundle, loaded: FluxBundle) -> None:
    settings = {"pixels": 64, "steps": 3, "words": 16, "negative": True}
    drawn, truth = (picture(model, **settings) for model in (loaded, Masked(built)))
    np.testing.assert_allclose(drawn, truth, atol=1e-3)
    assert not np.allclose(drawn, picture(loaded, pixels=64, steps=3, words=16), atol=1e-3)


def inputs(batch: int = 1) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 9, 16),
        "encoder_hidden_states": torch.randn(batch, 4, 64),
        "pooled_projections": torch.randn(batch, 32),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": torch.zeros(9, 3),
        "txt_ids": torch.zeros(4, 3),
        "guidance": torch.tensor([3.5]),
    }


def test_one_guidance_for_the_batch_and_batched_positions(loaded: FluxBundle) -> None:
    given = inputs(batch=2)
    expected = loaded(**given)
    assert isinstance(expected, Transformer2DModelOutput)
    given |= {"guidance": torch.full((2,), 3.5), "img_ids": given["img_ids"].expand(2, -1, -1)}
    (sample,) = loaded(**given, return_dict=False)
    assert torch.equal(sample, expected.sample)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"guidance": None}, "guidance"), ({"joint_attention_kwargs": {"scale": 0.5}}, "scale"), ({"timestep": 2.0}, "2")],
)
def test_what_it_cannot_do_is_refused(loaded: FluxBundle, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineMismatchError, match=message):
        loaded(**{**inputs(), **changes})


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("pipeline"))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object, code: int = 0) -> None:
    monkeypatch.setattr(sys, "argv", ["dyexport", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == code


def test_a_saved_pipeline_takes_the_bundle_as_its_transformer(
    built: Bundle, loaded: FluxBundle, pipeline: Path
) -> None:
    pipe = FluxPipeline.from_pretrained(pipeline, transformer=loaded)
    settings = {"prompt": "a cat", "height": 64, "width": 64, "num_inference_steps": 3, "output_type": "pt"}
    drawn = pipe(**settings, generator=torch.Generator().manual_seed(0)).images
    pipe.transformer = Masked(built)
    truth = pipe(**settings, generator=torch.Generator().manual_seed(0)).images
    assert drawn.shape == (1, 3, 64, 64)
    np.testing.assert_allclose(drawn, truth, atol=1e-3)


def test_sample_draws_prompts(
    built: Bundle, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cats.png"
    size = ["--height", 64, "--width", 128, "--steps", 2]
    prompts = ["--prompt", "a cat", "--prompt", "a dog"]
    run(monkeypatch, "sample", built.root, *prompts, "--pipeline", pipeline, *size, "-o", out, "--json")
    assert json.loads(capsys.readouterr().out)["texts"] == ["a cat", "a dog"]
    image = np.asarray(Image.open(out))  # two of 64 x 128, with gaps
    assert image.shape == (68, 262, 3)
    assert not np.array_equal(image[2:66, 2:130], image[2:66, 132:260])


def embedded(tmp_path: Path, text: tuple[int, ...] = (2, 7, 64)) -> Path:
    path = tmp_path / "prompts.safetensors"
    save_file({"prompt_embeds": torch.randn(text), "pooled_prompt_embeds": torch.randn(2, 32)}, path)
    return path


@pytest.mark.parametrize("name", ["prompts.png", "prompts.safetensors"])
def test_latents_replace_no_file_that_was_not_named(
    built: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    prompts = embedded(tmp_path)
    before = prompts.read_bytes()
    run(monkeypatch, "sample", built.root, "--prompt-embeds", prompts, "-o", tmp_path / name, code=2)
    assert name in capsys.readouterr().err
    assert prompts.read_bytes() == before


def test_embedded_prompts_need_no_text_encoder(
    built: Bundle, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["sample", built.root, "--prompt-embeds", embedded(tmp_path), "--steps", 2, "--height", 64, "--width", 64]
    run(monkeypatch, *asked, "-o", tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors")["latents"].shape == (2, 16, 16)
    run(monkeypatch, *asked, "-o", tmp_path / "y.png", "--vae", pipeline / "vae")
    assert Image.open(tmp_path / "y.png").size == (134, 68)


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({}, UsageError, "--prompt"),
        ({"texts": ("a",), "embedded": Path("x")}, UsageError, "one of the two"),
        ({"texts": ("a",)}, UsageError, "--pipeline"),
        ({"texts": ("a",), "pipeline": "/nowhere"}, CheckpointError, "/nowhere"),
        ({"texts": ("a",), "height": 100}, UsageError, "multiple of 16"),
        ({"texts": ("a",), "height": 0}, UsageError, "--height is 0"),
        ({"texts": ("a",), "width": 2**40}, UsageError, f"--width is {2**40}"),
        ({"texts": ("a",), "steps": 0}, UsageError, "--steps is 0"),
        ({"texts": ("a",), "steps": 10**20}, UsageError, f"--steps is {10**20}"),
        ({"texts": ("a",), "guidance": float("nan")}, UsageError, "--guidance is nan"),
        ({"texts": ("a",), "guidance": 1e38}, UsageError, r"--guidance is 1e\+38"),
        ({"embedded": Path("missing.safetensors")}, DataError, "missing.safetensors"),
    ],
)
def test_what_cannot_be_drawn(loaded: FluxBundle, asked: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sample_prompts(loaded, Prompts(**asked))


def test_a_picture_that_no_memory_holds_is_refused_before_it_is_drawn(loaded: FluxBundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="32768 x 32768 are 1073741824 pixels"):
        sample_prompts(loaded, Prompts(embedded=embedded(tmp_path), height=2**15, width=2**15))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_are_no_picture(loaded: FluxBundle, tmp_path: Path, value: float) -> None:
    file = embedded(tmp_path)
    tensors = load_file(file)
    tensors["pooled_prompt_embeds"][0, 0] = value
    save_file(tensors, file)
    with pytest.raises(DyexportError, match="not finite"):
        sample_prompts(loaded, Prompts(embedded=file, steps=1, height=64, width=64))


def test_embeddings_of_another_model(loaded: FluxBundle, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\(2, 7, 63\)"):
        sample_prompts(loaded, Prompts(embedded=embedded(tmp_path, (2, 7, 63))))
