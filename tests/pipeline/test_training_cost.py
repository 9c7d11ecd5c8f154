"""What ``dyexport build --model flux --budget 0.5`` means, and what it says where it cannot be had."""

from __future__ import annotations

import gc
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModel, T5EncoderModel

from dyexport.backbones.recipe import LOW_RANK_FINETUNING
from dyexport.errors import CheckpointError, DataError, DyexportError, UsageError
from dyexport.lora import LoraSpec
from dyexport.pipeline import steps
from dyexport.pipeline.settings import BuildSettings
from dyexport.pipeline.training_cost import check_training, finetuning_run, trainable, training_memory
from dyexport.presets import get_preset
from dyexport.training import cost
from dyexport.training.cost import TrainingCost, check_fits, measured_speed
from dyexport.training.data_files import read_prompts
from dyexport.training.memory import (
    Division,
    FinetuningRun,
    Launch,
    choose_division,
    divisions,
    memory_of,
    release_memory,
)
from dyexport.training.prompts import embed_prompts
from tests.pipeline.tiny_pipeline import save_latte_pipeline, save_pipeline

SCHEDULE = LOW_RANK_FINETUNING.finetune_lora


def run_of(settings: BuildSettings) -> FinetuningRun:
    run = finetuning_run(settings)
    assert run is not None
    return run


ONE = Division(micro_batch=1, checkpointing=True)
WHOLE = Division(micro_batch=SCHEDULE.batch_size, checkpointing=False)


def estimate(settings: BuildSettings, division: Division = ONE) -> TrainingCost:
    return cost.estimate(run_of(settings), division)


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
    default = estimate(flux, WHOLE)
    assert estimate(replace(flux, finetune_steps=2 * SCHEDULE.steps), WHOLE).training_flops == pytest.approx(
        2 * default.training_flops
    )
    given = estimate(replace(flux, data=latents), WHOLE)
    assert (given.synthetic_flops, given.data_bytes) == (0, 0)
    assert given.training_flops == default.training_flops
    # One dense pass of FLUX.1-dev at 1024 px is about 60 teraflops: 24 billion operations a token, and attention.
    dense = default.training_flops / (SCHEDULE.steps * SCHEDULE.batch_size * 2 * 1.2)
    assert 5e13 < dense < 8e13
    recomputed = estimate(flux, replace(WHOLE, checkpointing=True)).training_flops - default.training_flops
    divided = estimate(flux, replace(WHOLE, micro_batch=4)).training_flops - default.training_flops
    samples = SCHEDULE.steps * SCHEDULE.batch_size
    assert recomputed == pytest.approx(1.2 * dense * samples)
    assert divided == pytest.approx(dense * samples)
    published = estimate(replace(flux, token_router="published"), WHOLE).memory.total - default.memory.total
    routers = 57 * 4 * 3072**2  # parameters of DyFLUX's token routers, in place of a sixtieth of that
    assert published == pytest.approx(20 * routers, rel=0.02)


@pytest.mark.parametrize(
    "spec", [LoraSpec(rank=4, alpha=4), LoraSpec(rank=64, experts=8, alpha=64, variant="symmetric")]
)
def test_memory_is_that_of_the_rank_asked_for(flux: BuildSettings, spec: LoraSpec) -> None:
    asked = replace(flux, td_lora=spec)
    trained = {settings: trainable(settings)["trainable_parameters"] for settings in (flux, asked)}
    more = estimate(asked).memory.total - estimate(flux).memory.total
    assert more == pytest.approx(20 * (trained[asked] - trained[flux]))  # weight, gradient, two moments, average


def test_memory_is_that_of_a_pass_and_of_the_base(flux: BuildSettings) -> None:
    run = run_of(flux)
    assert run.base_precision == "bf16"
    one, four = (memory_of(run, replace(ONE, micro_batch=samples)) for samples in (1, 4))
    assert four.activations == pytest.approx(4 * one.activations)
    assert replace(four, activations=0) == replace(one, activations=0)
    kept = memory_of(run, replace(ONE, checkpointing=False))
    assert kept.activations > 15 * one.activations
    weights = {base: memory_of(replace(run, base_precision=base), ONE).weights for base in ("fp32", "bf16", "nf4")}
    parameters = flux.preset.parameters
    assert weights["fp32"] - weights["bf16"] == pytest.approx(2 * parameters, rel=0.02)
    assert weights["bf16"] - weights["nf4"] == pytest.approx(11.5 / 8 * parameters, rel=0.02)
    whole = replace(run, td_lora=None, base_precision="fp32")
    assert memory_of(whole, ONE).weights == pytest.approx(4 * parameters, rel=0.02)
    exchanged = memory_of(run, ONE, Launch(processes=2)).gradients
    assert exchanged == 2 * one.gradients


def test_it_is_trained_on_the_cards_that_people_have(flux: BuildSettings) -> None:
    """The goal: FLUX.1-dev with a base in bf16 on 48 GB, and with one of 4 bits on 24 GB."""
    smallest = {
        base: memory_of(replace(run_of(flux), base_precision=base), ONE).total for base in ("fp32", "bf16", "nf4")
    }
    assert smallest["nf4"] < 20e9 < smallest["bf16"] < 40e9 < smallest["fp32"]


def test_a_batch_is_divided_no_more_than_it_must(flux: BuildSettings) -> None:
    run = run_of(flux)
    order = list(divisions(run))
    assert order[0] == WHOLE
    assert order[1:] == [Division(micro_batch=samples, checkpointing=True) for samples in (8, 4, 2, 1)]
    assert next(divisions(run, processes=4)) == replace(WHOLE, micro_batch=2)
    totals = [memory_of(run, division).total for division in order]
    assert totals == sorted(totals, reverse=True)
    for division, total in zip(order, totals, strict=True):
        assert choose_division(run, 1.2 * total) == division
    assert choose_division(run, 0.0) == order[-1]
    kept = replace(run, checkpointing="off")
    assert not any(division.checkpointing for division in divisions(kept))
    assert list(divisions(replace(run, micro_batch=2, checkpointing="on"))) == [
        Division(micro_batch=2, checkpointing=True)
    ]
    assert choose_division(replace(run, preset=get_preset("flux-tiny")), 1e9) == WHOLE


def test_it_is_described_on_every_machine(flux: BuildSettings) -> None:
    text = cost.describe_memory(run_of(flux), 48e9, Launch())
    assert re.fullmatch(
        r"memory of fine-tuning, estimated: \d+ GB \(\d+ GB weights, .* GB gradients, .* GB optimizer and averages, "
        r".* GB activations, recomputed; \d+ GB if kept\), 2 of 8 samples at a time; 48 GB free",
        text,
    )
    assert training_memory(flux) is not None
    assert training_memory(replace(flux, finetune_steps=0)) is None


def test_the_text_of_videos_is_data_too(tmp_path: Path) -> None:
    settings = BuildSettings(model="latte", budget=0.5, data="synthetic", out=tmp_path / "out", work=tmp_path / "work")
    preset = settings.preset
    embedded = preset.text_tokens * 4096
    assert estimate(settings).data_bytes == 4 * settings.sampling.samples * (math.prod(preset.latent_shape) + embedded)


def test_memory_that_others_hold_is_not_free(flux: BuildSettings) -> None:
    run, alone = run_of(flux), Launch()
    check_fits(run, 48e9, 48e9, alone)
    with pytest.raises(DyexportError, match=r"about 33 GB .* has 10 free; end what takes the rest of its 48"):
        check_fits(run, 10e9, 48e9, alone)
    with pytest.raises(DyexportError, match=r"has 24 free; give --base-precision int8, or give --finetune-steps 0"):
        check_fits(run, 24e9, 24e9, alone)
    with pytest.raises(DyexportError, match=r"has 23 free; give --base-precision nf4, or"):
        check_fits(replace(run, base_precision="int8", distill=True), 23e9, 24e9, alone)
    with pytest.raises(DyexportError, match=r"leave out --gradient-checkpointing and --micro-batch, or"):
        check_fits(replace(run, checkpointing="off"), 48e9, 48e9, alone)
    with pytest.raises(DyexportError, match=r"has 8 free; give --finetune-steps 0"):
        check_fits(run, 8e9, 8e9, alone)


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
    release_memory()
    assert not any(isinstance(held, CLIPTextModel | T5EncoderModel) for held in gc.get_objects())
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
