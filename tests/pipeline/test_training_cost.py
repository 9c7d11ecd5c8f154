"""What ``dyexport build --model flux --budget 0.5`` means, and what it says where it cannot be had."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dyexport.backbones.recipe import LOW_RANK_FINETUNING
from dyexport.errors import CheckpointError, DataError, DyexportError, UsageError
from dyexport.lora import LoraSpec
from dyexport.pipeline import steps
from dyexport.pipeline.settings import BuildSettings
from dyexport.pipeline.steps import check_training
from dyexport.training import cost
from dyexport.training.cost import TRAINED, FinetuningRun, TrainingCost, measured_speed
from dyexport.training.data_files import read_prompts
from dyexport.training.prompts import embed_prompts
from tests.pipeline.tiny_pipeline import save_latte_pipeline, save_pipeline

SCHEDULE = LOW_RANK_FINETUNING.finetune_lora


def run_of(settings: BuildSettings) -> FinetuningRun:
    run = steps.finetuning_run(settings)
    assert run is not None
    return run


def estimate(settings: BuildSettings, **launched: Any) -> TrainingCost:
    return cost.estimate(run_of(settings), **launched)


def check_fits(settings: BuildSettings, effort: TrainingCost, *, free: int, total: int) -> None:
    cost.check_fits(run_of(settings), effort, free, total)


@pytest.fixture
def flux(tmp_path: Path) -> BuildSettings:
    return BuildSettings(model="flux", budget=0.5, out=tmp_path / "out", work=tmp_path / "work")


@pytest.fixture
def latents(tmp_path: Path) -> str:
    """A directory with a file of latents, which is not read."""
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "a.safetensors").touch()
    return str(tmp_path / "latents")


def test_a_large_model_trains_a_lora_on_its_own_pictures(flux: BuildSettings, latents: str) -> None:
    assert (flux.routers, flux.data_source, flux.lora) == ("trained", "synthetic", LOW_RANK_FINETUNING.td_lora)
    assert flux.finetune_schedule == SCHEDULE
    assert replace(flux, data=latents).data_source == latents
    own = LoraSpec(rank=4, alpha=4)
    assert replace(flux, td_lora=own).lora == own


def test_without_training_there_is_neither(flux: BuildSettings) -> None:
    calibrated = replace(flux, finetune_steps=0)
    assert (calibrated.routers, calibrated.data_source, calibrated.lora) == ("none", None, None)
    assert check_training(calibrated) is None


def test_small_models_train_all_their_weights(flux: BuildSettings, latents: str) -> None:
    small = replace(flux, model="dit-xl-2", data=latents)
    assert small.lora is None
    assert check_training(small) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_sentence_with_the_ways_out(flux: BuildSettings) -> None:
    with pytest.raises(DyexportError, match=r"flux \(11\.9 billion .* --finetune-steps 0 .*--checkpoint DIR"):
        check_training(flux)


def test_effort_grows_with_what_is_asked(flux: BuildSettings, latents: str) -> None:
    default = estimate(flux)
    assert estimate(replace(flux, finetune_steps=2 * SCHEDULE.steps)).training_flops == pytest.approx(
        2 * default.training_flops
    )
    given = estimate(replace(flux, data=latents))
    assert (given.synthetic_flops, given.data_bytes) == (0, 0)
    assert given.training_flops == default.training_flops
    # One dense pass of FLUX.1-dev at 1024 px is about 60 teraflops: 24 billion operations a token, and attention.
    passes = SCHEDULE.steps * SCHEDULE.batch_size * 2 * 1.2
    assert 5e13 < default.training_flops / passes < 8e13
    assert default.device_bytes > 2 * flux.preset.parameters
    published = estimate(replace(flux, token_router="published"))
    routers = 57 * 4 * 3072**2  # parameters of DyFLUX's token routers, in place of a sixtieth of that
    assert published.device_bytes - default.device_bytes == pytest.approx(TRAINED * routers, rel=0.02)


@pytest.mark.parametrize(
    "spec", [LoraSpec(rank=4, alpha=4), LoraSpec(rank=64, experts=8, alpha=64, variant="symmetric")]
)
def test_memory_is_that_of_the_rank_asked_for(flux: BuildSettings, spec: LoraSpec) -> None:
    asked = replace(flux, td_lora=spec)
    trained = {settings: steps.trainable(settings)["trainable_parameters"] for settings in (flux, asked)}
    more = estimate(asked).device_bytes - estimate(flux).device_bytes
    assert more == pytest.approx(TRAINED * (trained[asked] - trained[flux]))


def test_memory_is_that_of_the_whole_batch(flux: BuildSettings) -> None:
    """Each GPU has the weights in fp32 and its share of the batch's activations."""
    alone, eight = (estimate(flux, processes=count).device_bytes for count in (1, 8))
    half = estimate(flux, processes=8, precision="bf16").device_bytes
    fixed = 2 * half - eight
    trained = steps.trainable(flux)["trainable_parameters"]
    assert fixed == pytest.approx(4 * flux.preset.parameters + TRAINED * trained)
    assert alone - fixed == pytest.approx(8 * (eight - fixed))


def test_the_text_of_videos_is_data_too(tmp_path: Path) -> None:
    settings = BuildSettings(model="latte", budget=0.5, data="synthetic", out=tmp_path / "out", work=tmp_path / "work")
    preset = settings.preset
    embedded = preset.text_tokens * 4096
    assert estimate(settings).data_bytes == 4 * settings.sampling.samples * (math.prod(preset.latent_shape) + embedded)


def test_memory_that_others_hold_is_not_free(flux: BuildSettings) -> None:
    effort = replace(estimate(flux), device_bytes=70e9)
    check_fits(flux, effort, free=80_000_000_000, total=80_000_000_000)
    with pytest.raises(DyexportError, match=r"about 70 GB .* has 10 free; end what takes the rest of its 80"):
        check_fits(flux, effort, free=10_000_000_000, total=80_000_000_000)
    with pytest.raises(DyexportError, match=r"has 40 free; give --finetune-steps 0"):
        check_fits(flux, effort, free=40_000_000_000, total=48_000_000_000)
    with pytest.raises(DyexportError, match=r"--mixed_precision bf16` on up to 8 GPUs"):
        check_fits(flux, replace(effort, device_bytes=1e12), free=200_000_000_000, total=200_000_000_000)


def test_what_accelerate_cannot_do_here_is_said_before_anything_is_sampled(
    flux: BuildSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(UsageError, match="ACCELERATE_GRADIENT_ACCUMULATION_STEPS is 4"):
        check_training(replace(flux, model="dit-digits"))
    assert check_training(replace(flux, finetune_steps=0)) is None


def test_speed_is_measured() -> None:
    assert measured_speed(torch.device("cpu"), size=64, seconds=0.01) > 0


def test_prompts_come_from_a_file_or_are_many(tmp_path: Path) -> None:
    assert len(set(read_prompts(None))) == 300
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  a dog \n", encoding="utf-8")
    assert read_prompts(file) == ("a cat", "a dog")
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="holds no prompts"):
        read_prompts(file)
    with pytest.raises(DataError, match="one prompt a line"):
        read_prompts(tmp_path / "none.txt")


def test_prompts_are_embedded_by_the_pipeline_beside_the_transformer(tmp_path: Path, flux: BuildSettings) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline")
    tiny = replace(flux, model="flux-tiny", checkpoint=str(pipeline), finetune_steps=0)
    source = steps.checkpoint_source(tiny)
    assert source == pipeline / "transformer"
    found = steps.text_encoders(tiny, source)
    assert found == str(pipeline)
    embedded = embed_prompts(found, tuple("abcdefghij"), tiny.preset)
    assert embedded["encoder_hidden_states"].shape == (10, 16, 64)
    assert embedded["pooled_projections"].shape == (10, 32)
    assert not torch.equal(embedded["encoder_hidden_states"][0], embedded["encoder_hidden_states"][9])
    alone = embed_prompts(found, ("j",), tiny.preset)
    torch.testing.assert_close(embedded["encoder_hidden_states"][9:], alone["encoder_hidden_states"])


def test_latte_learns_what_no_prompt_looks_like(tmp_path: Path, flux: BuildSettings) -> None:
    pipeline = save_latte_pipeline(tmp_path / "pipeline")
    tiny = replace(flux, model="latte-tiny", checkpoint=str(pipeline), finetune_steps=0)
    found = steps.text_encoders(tiny, steps.checkpoint_source(tiny))
    assert found == str(pipeline)
    preset = replace(tiny.preset, text_tokens=120)
    (embedded,) = embed_prompts(found, tuple("abcdefghij"), preset).values()
    assert embedded.shape == (12, 120, 32)
    assert torch.equal(embedded[10], embedded[11])
    assert [int(row.any(dim=-1).sum()) for row in embedded] == [3] * 10 + [1] * 2  # a space, the letter and the end
    (alone,) = embed_prompts(found, ("j",), preset).values()
    torch.testing.assert_close(embedded[9:11], alone)


def test_no_text_encoders(tmp_path: Path, flux: BuildSettings) -> None:
    with pytest.raises(CheckpointError, match="--finetune-steps 0"):
        embed_prompts(str(tmp_path), ("a",), flux.preset)
    with pytest.raises(UsageError, match="samples from class labels"):
        replace(flux, model="dit-xl-2", data="synthetic:x.txt")
