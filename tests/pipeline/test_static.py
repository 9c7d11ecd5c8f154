"""A bundle of static widths: one slim network for every timestep, trained, calibrated and exported like any other."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import save_file

from dyexport.bench.case import opened_case, step_variants
from dyexport.bench.case_rows import step_rows
from dyexport.bench.energy import Meter
from dyexport.bench.latency import Blocks, time_rounds
from dyexport.bench.report import inspect_payload, inspect_table
from dyexport.bench.settings import BenchSettings
from dyexport.bundle.manifest import Manifest
from dyexport.bundle.reader import Bundle
from dyexport.calibration.widths import read_widths
from dyexport.checkpoints.dynamic import load_dynamic
from dyexport.pipeline.build import calibrate_model, opened, price_plans
from dyexport.pipeline.settings import BuildSettings
from dyexport.pipeline.stage_settings import dynamic_settings
from dyexport.runtime.loading import load
from dyexport.runtime.saving import model_card
from dyexport.runtime.stock import example_inputs
from dyexport.stages.ledger import NullListener
from dyexport.verification.settings import VerifySettings
from dyexport.verification.verify import verify_bundle
from tests.built import built_once, in_turn
from tests.pipeline.tiny import TINY, redone, tiny_settings

STEPS = 10


def static_settings(folder: Path) -> BuildSettings:
    data = folder / "data"
    return tiny_settings(folder, widths="static", data=str(data), finetune_steps=STEPS, baseline=True)


@pytest.fixture(scope="session")
def folder(shared_folder: Path) -> Path:
    """A folder with training data, for a bundle and its work directory."""
    folder = shared_folder / "sit-tiny-static"
    with in_turn(folder / "data"):
        if not (file := folder / "data" / "0.safetensors").exists():
            latents = torch.randn(64, *TINY.latent_shape, generator=torch.Generator().manual_seed(0))
            save_file({"latents": latents, "labels": torch.arange(64) % TINY.classes}, file)
    return folder


@pytest.fixture(scope="session")
def bundle(folder: Path) -> Bundle:
    """``sit-tiny`` in static widths, trained for a few steps, with its dense network."""
    values = static_settings(folder)
    return built_once(
        folder, widths=values.widths, data=values.data, finetune_steps=values.finetune_steps, baseline=True
    )


def test_the_bundle_is_right_and_stays_finished(bundle: Bundle, folder: Path) -> None:
    assert bundle.manifest.widths == "static"
    assert bundle.manifest.plan.flops_ratio == pytest.approx(0.5, abs=0.03)  # half a unit of sit-tiny is 0.025
    assert len(bundle.widths.grid) == 1
    assert bundle.token_stats is None
    report = verify_bundle(bundle.root, VerifySettings(timesteps=8))
    assert report.passed
    assert report.wrong_gates == 0
    assert redone(static_settings(folder)) == set()


def test_its_widths_are_those_that_were_trained(bundle: Bundle, folder: Path) -> None:
    """Not those of importance, which a build falls back on."""
    (calibrated,) = folder.glob("work/calibrated*")
    model, preset = load_dynamic(calibrated)
    assert model.router == "static"
    assert model.table is None
    logits = torch.cat([router.heads.bias for router in model.block_routers])
    assert len(logits.unique()) == len(logits)
    widths = read_widths(model, preset.timestep_range)
    assert (widths.heads == bundle.widths.heads).all()
    assert (widths.groups == bundle.widths.groups).all()


def test_its_one_graph_is_as_plain_as_the_dense_one(bundle: Bundle) -> None:
    graphs = {
        name: onnx.load(bundle.root / "graphs" / f"{name}.onnx", load_external_data=False).graph
        for name in ("segment-00", "dense")
    }
    assert set(bundle.engine_paths("onnx")) == {"segment-00", "conditioning", "dense", "dense-conditioning"}
    slim, dense = graphs["segment-00"], graphs["dense"]
    assert [value.name for value in slim.input] == ["hidden_states", "modulation"] == [v.name for v in dense.input]
    assert Counter(node.op_type for node in slim.node) == Counter(node.op_type for node in dense.node)


def test_one_engine_serves_every_t_and_says_that_it_is_static(bundle: Bundle) -> None:
    transformer = load(bundle.root)
    start, end = transformer.spec.timestep_range
    for share in (0.0, 0.2, 0.5, 0.999):
        transformer(**example_inputs(transformer.spec, 2, start + share * (end - start)))
    assert len(transformer.engine.engines) == 1
    assert transformer.engine.clock.activations == [1]
    assert repr(transformer).endswith("built for 0.5, static widths)")
    assert ", static, onnx)" in repr(bundle)
    assert inspect_payload(bundle)["static"] is True
    assert "static widths" in str(inspect_table(bundle).title)
    card = model_card(bundle.manifest)
    assert "cut into one slim\nengine, which serves all sampling steps." in card
    assert "| widths | static |" in card


def test_a_benchmark_calls_it_static(bundle: Bundle) -> None:
    settings = BenchSettings(rounds=2, steps=2, batches=(1,), compiled=False, eager=False)
    with opened_case(bundle, settings, 1, None) as case:
        variants = step_variants(case)
        first = dict.fromkeys(variants, 1.0)
        timings = time_rounds(variants, Blocks(rounds=2), clock=case.clock)
        rows = step_rows(case, timings, first, variants, Meter(counter=None))
    assert [row.variant for row in rows] == ["static", "dense", "conditioning", "segment 0"]
    assert rows[0].over_dense is not None


def test_a_manifest_without_widths_is_of_a_dynamic_bundle(sit_tiny: Bundle) -> None:
    content = sit_tiny.manifest.model_dump()
    assert content.pop("widths") == "dynamic"
    assert Manifest.model_validate(content) == sit_tiny.manifest


def test_a_plan_that_follows_t_is_not_static(sit_tiny: Bundle) -> None:
    with pytest.raises(ValueError, match="static widths need one segment without gates"):
        Manifest.model_validate({**sit_tiny.manifest.model_dump(), "widths": "static"})


def test_dynamic_models_are_kept_under_their_old_names(tmp_path: Path) -> None:
    dynamic = tiny_settings(tmp_path)
    named = dynamic_settings(dynamic)
    assert named["router"] == "free"
    assert "widths" not in named
    assert dynamic_settings(replace(dynamic, widths="dynamic")) == named
    assert dynamic_settings(replace(dynamic, widths="static")) == {**named, "router": "static"}


def test_without_training_and_from_a_checkpoint(tmp_path: Path) -> None:
    """Importance chooses one table for all t, which a build from that checkpoint keeps."""
    settings = tiny_settings(tmp_path / "chosen", widths="static", finetune_steps=0)
    with opened(settings, NullListener()) as run:
        model, priced = calibrate_model(run), price_plans(run, [1])[0].plan
    assert priced.is_static
    assert priced.flops_ratio == pytest.approx(0.5, abs=0.03)
    given = BuildSettings.complete(checkpoint=str(model.path), out=tmp_path / "given")
    with opened(given, NullListener()) as run:
        again = calibrate_model(run)
    assert given.planned_widths == "static"
    for kept, chosen in zip(again.tables[1].heads, model.tables[1].heads, strict=True):
        assert (kept == chosen).all()
