"""Latte end to end: bundles against the masked model, in the stock pipeline, and through the commands."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LattePipeline
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from PIL import Image, ImageSequence
from safetensors.torch import load_file, save_file

from dyexport.backbones.latte.preset import LattePreset
from dyexport.backbones.latte.stand_in import LatteBundle
from dyexport.bench.variants import conditioning_variant, segment_variants
from dyexport.bundle.reader import Bundle
from dyexport.checkpoints.dynamic import load_dynamic
from dyexport.cli import main
from dyexport.errors import DataError, EngineMismatchError, UsageError
from dyexport.pipeline.settings import BuildSettings
from dyexport.presets import PRESETS
from dyexport.runtime.loading import load
from dyexport.runtime.prompt_settings import Prompts
from dyexport.runtime.prompts import sample_prompts
from dyexport.runtime.stock import example_inputs, stock_transformer
from dyexport.verification.settings import VerifySettings
from dyexport.verification.verify import find_reference, verify_bundle
from tests.pipeline.tiny import build
from tests.pipeline.tiny_pipeline import save_latte_pipeline
from tests.verification.test_layers import assert_every_layer_agrees

TINY = PRESETS["latte-tiny"]
assert isinstance(TINY, LattePreset)
PAIR = replace(TINY, name="latte-pair", pairs=1, hidden_size=64)


@pytest.fixture(scope="module")
def built(latte_tiny: Bundle) -> Bundle:
    return latte_tiny


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where bundles of one pair of blocks go; they share what comes before the graphs."""
    return tmp_path_factory.mktemp("pair")


def settings(root: Path, preset: LattePreset, **values: Any) -> BuildSettings:
    path = values.get("token_path", "auto")
    return BuildSettings(model=preset, budget=0.5, random_weights=True, out=root / path, work=root / "work", **values)


@pytest.fixture(scope="module")
def loaded(built: Bundle) -> LatteBundle:
    transformer = load(built.root, check_hashes=False)
    assert isinstance(transformer, LatteBundle)
    return transformer


def test_every_layer_agrees(built: Bundle) -> None:
    assert_every_layer_agrees(built)


class Masked(torch.nn.Module):
    """The masked model with the stock module's signature."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self.model, _ = load_dynamic(find_reference(bundle))
        self.config, self.dtype, self.device = self.model.config, torch.float32, torch.device("cpu")

    def forward(self, *, return_dict: bool, enable_temporal_attentions: bool, **inputs: torch.Tensor) -> Any:
        assert not return_dict
        assert enable_temporal_attentions
        return (self.model(inputs).sample,)


def video(transformer: Any, *, frames: int, pixels: tuple[int, int], steps: int, guidance: float = 3.0) -> torch.Tensor:
    """Latents (1, C, F, H, W) from diffusers' own pipeline, guided by an embedded prompt and an embedded nothing."""
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    pipe = LattePipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(3)
    prompt, nothing = (torch.randn(1, 7, 32, generator=draw) for _ in range(2))
    return pipe(
        prompt_embeds=prompt,
        negative_prompt_embeds=nothing,
        negative_prompt=None,
        guidance_scale=guidance,
        num_inference_steps=steps,
        video_length=frames,
        height=pixels[0],
        width=pixels[1],
        generator=draw,
        output_type="latent",
    ).frames


def test_equals_the_masked_model(built: Bundle) -> None:
    report = verify_bundle(built.root, VerifySettings(timesteps=64))
    assert report.passed
    assert report.max_abs_error < 2e-5
    assert all(segment.compared for segment in report.segments)


@pytest.mark.parametrize("path", ["masked", "capacity", "dynamic"])  # compact is what ``built`` has
def test_other_token_paths_equal_the_masked_model(pair: Path, path: str) -> None:
    bundle = build(settings(pair, PAIR, token_path=path, engines=1, baseline=False))
    assert {p for segment in bundle.manifest.plan.segments for p in segment.token_paths} == {path}
    report = verify_bundle(bundle.root, VerifySettings(timesteps=64))
    assert report.passed
    assert report.max_abs_error < 2e-5
    assert sum(segment.compared for segment in report.segments) > 32


@pytest.mark.parametrize(
    ("frames", "pixels", "steps", "guidance"),
    [(4, (64, 64), 20, 3.0), (4, (96, 48), 3, 3.0), (1, (64, 64), 5, 1.0)],
)
def test_one_bundle_serves_videos_and_pictures_of_any_size(
    built: Bundle, loaded: LatteBundle, frames: int, pixels: tuple[int, int], steps: int, guidance: float
) -> None:
    drawn, truth = (
        video(model, frames=frames, pixels=pixels, steps=steps, guidance=guidance) for model in (loaded, Masked(built))
    )
    assert drawn.shape == (1, 4, frames, pixels[0] // 8, pixels[1] // 8)
    np.testing.assert_allclose(drawn, truth, atol=1e-3)  # rounding, carried through all steps


def test_frames_and_sides_are_symbols_of_the_graph(loaded: LatteBundle) -> None:
    latents, text, modulation = (spec.shape for spec in loaded.engine.engines[0].io.inputs[:3])
    assert latents == ("batch", 4, "frames", "2*height", "2*width")
    assert text == ("batch", "text_tokens", 32)
    assert modulation == (1, 8 * 128)
    assert loaded.engine.engines[0].io.outputs[0].shape == ("batch", 8, "frames", "2*height", "2*width")


def test_the_prompt_matters(loaded: LatteBundle) -> None:
    given = inputs()
    other = {**given, "encoder_hidden_states": torch.randn(1, 3, 32)}
    assert not torch.allclose(loaded(**given).sample, loaded(**other).sample, atol=1e-3)


def test_conditioning_runs_once_for_each_timestep(loaded: LatteBundle) -> None:
    """Whatever the prompt and the batch."""
    loaded(**inputs())
    before = loaded.conditioner.seconds
    loaded(**{**inputs(), "encoder_hidden_states": torch.randn(1, 5, 32)})
    batch = {name: torch.cat([value, value]) for name, value in inputs().items()}
    sample = loaded(**batch).sample
    assert loaded.conditioner.seconds == before
    torch.testing.assert_close(sample[:1], loaded(**inputs()).sample, atol=1e-5, rtol=1e-5)


def inputs() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 4, 4, 8, 8, generator=draw),
        "encoder_hidden_states": torch.randn(1, 6, 32, generator=draw),
        "timestep": torch.tensor([500]),
    }


def test_it_answers_as_the_stock_module_does(loaded: LatteBundle) -> None:
    output = loaded(**inputs())
    assert isinstance(output, Transformer2DModelOutput)
    (sample,) = loaded(**inputs(), return_dict=False)
    assert torch.equal(sample, output.sample)
    assert sample.shape == (1, 8, 4, 8, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_states": torch.zeros(1, 4, 3, 8, 8)}, "4 frames, or of one, not of 3"),
        ({"hidden_states": torch.zeros(1, 4, 4, 8, 7)}, "8 x 7; both must be multiples of 2"),
        ({"encoder_hidden_states": None}, "encoder_hidden_states"),
        ({"encoder_attention_mask": torch.ones(1, 6)}, "encoder_attention_mask"),
        ({"enable_temporal_attentions": False}, "enable_temporal_attentions"),
        ({"timestep": 1001.0}, "1001"),
    ],
)
def test_what_it_cannot_do_is_refused(loaded: LatteBundle, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineMismatchError, match=message):
        loaded(**{**inputs(), **changes})


def test_what_bench_times_runs(built: Bundle, loaded: LatteBundle) -> None:
    given = example_inputs(built.manifest.model, 2, 300.0)
    stock = stock_transformer(built.manifest.model)
    assert stock(**given).sample.shape == loaded(**given).sample.shape == (2, 8, 4, 8, 8)
    for variant in (*segment_variants(loaded, built, 2), conditioning_variant(loaded, 2, 5)):
        variant()


def test_inspect_and_plan(built: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, capsys, "inspect", built.root)["model"] == "latte-tiny"
    work = built.root.with_name("work")
    options = ("--model", "latte-tiny", "--budget", 0.5, "--random-weights", "--work", work)
    assert run(monkeypatch, capsys, "plan", *options)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_latte_pipeline(tmp_path_factory.mktemp("pipeline"))


def test_sample_draws_videos_of_prompts(
    built: Bundle, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--prompt", "a cat", "--prompt", "a dog", "--pipeline", pipeline, "--steps", 2]
    monkeypatch.chdir(tmp_path)
    drawn = run(monkeypatch, capsys, "sample", built.root, *asked)
    assert (drawn["path"], drawn["texts"]) == ("samples.gif", ["a cat", "a dog"])
    with Image.open("samples.gif") as film:  # two of 64 x 64, with gaps
        assert (film.format, film.n_frames, film.size) == ("GIF", 4, (134, 68))
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(film)]
    assert not np.array_equal(frames[0], frames[1])
    assert not np.array_equal(frames[0][2:66, 2:66], frames[0][2:66, 68:132])


def test_sample_draws_pictures_too(
    built: Bundle, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cat.png"
    asked = ["--prompt", "a cat", "--pipeline", pipeline, "--steps", 2, "--frames", 1, "--width", 128]
    assert run(monkeypatch, capsys, "sample", built.root, *asked, "-o", out)["frames"] == 1
    with Image.open(out) as picture:
        assert (picture.format, picture.size) == ("PNG", (132, 68))


def embedded(directory: Path, *names: str) -> Path:
    path = directory / "prompts.safetensors"
    save_file({name: torch.randn(2, 7, 32) for name in names}, path)
    return path


def test_embedded_prompts_need_no_text_encoder(
    built: Bundle, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = embedded(tmp_path, "prompt_embeds", "negative_prompt_embeds")
    asked = ["sample", built.root, "--prompt-embeds", file, "--steps", 2]
    run(monkeypatch, capsys, *asked, "-o", tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors")["latents"].shape == (2, 4, 4, 8, 8)
    run(monkeypatch, capsys, *asked, "-o", tmp_path / "y.gif", "--vae", pipeline / "vae")
    with Image.open(tmp_path / "y.gif") as film:
        assert film.n_frames == 4


def test_guidance_needs_an_unconditional_prompt(loaded: LatteBundle, tmp_path: Path) -> None:
    file = embedded(tmp_path, "prompt_embeds")
    with pytest.raises(DataError, match="lacks negative_prompt_embeds"):
        sample_prompts(loaded, Prompts(embedded=file, steps=1))
    assert sample_prompts(loaded, Prompts(embedded=file, steps=1, guidance=1.0)).values.shape == (2, 4, 4, 8, 8)


def test_other_numbers_of_frames_are_refused(loaded: LatteBundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--frames is 3; latte-tiny makes 4, or 1"):
        sample_prompts(loaded, Prompts(embedded=tmp_path / "x", frames=3))


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """What a command prints as JSON."""
    monkeypatch.setattr(sys, "argv", ["dyexport", *map(str, arguments), "--json"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert not exit_.value.code
    return json.loads(capsys.readouterr().out)
