"""Settings are checked before anything is written, in sentences that name the value."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dyexport.backbones.base import Preset
from dyexport.backbones.calibration_effort import DEFAULT_EFFORT, SPARSE, THOROUGH, CalibrationEffort
from dyexport.backbones.recipe import recipe_for
from dyexport.bundle.spec import Widths
from dyexport.errors import CheckpointError, DataError, DyexportError, UsageError
from dyexport.exporters.tensorrt_profiles import TensorrtSettings
from dyexport.lora import LoraFile, LoraSpec, parse_lora_file
from dyexport.pipeline.output import default_out
from dyexport.pipeline.settings import BuildSettings
from dyexport.pipeline.settings_file import SETTINGS
from dyexport.pipeline.stage_settings import dynamic_settings
from dyexport.pipeline.steps import checkpoint_source
from dyexport.presets import PRESETS, get_preset
from dyexport.training.data import open_source
from dyexport.training.synthetic_config import SyntheticConfig

LORA = LoraSpec(rank=2, alpha=2)


def settings(tmp_path: Path, **values: Any) -> BuildSettings:
    given = {"model": "dit-s-2", "budget": 0.5, "random_weights": True, **values}
    return BuildSettings(**{"out": tmp_path / "out", "work": tmp_path / "work", **given})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "dit-s-3"}, "unknown model 'dit-s-3'; did you mean 'dit-s-2'"),
        ({"model": 5}, "--model is 5; give the name of a preset"),
        ({"out": 3}, "-o is 3; give the path of a directory"),
        ({"work": b"w"}, "--work is b'w'; give the path of a directory"),
        ({"budget": 0.0}, "budget is 0"),
        ({"budget": 1.5}, "budget is 1.5"),
        ({"budget": -0.5}, "budget is -0.5"),
        ({"budget": float("nan")}, "budget is nan"),
        ({"budget": "0.5"}, "budget is '0.5'; give a FLOPs ratio"),
        ({"budget": True}, "budget is True"),
        ({"budgets": (0.5, "a")}, "budget is 'a'"),
        ({"budget": float("inf")}, "budget is inf"),
        ({"engines": 0}, "--engines is 0"),
        ({"quantize": "int3"}, "--quantize is 'int3'; use int8 or fp8"),
        ({"quantize": "fp8", "merge_tolerance": 0.1, "td_lora": LORA}, "--merge-tolerance is not measured in fp8"),
        ({"quantize": "int8", "targets": ("torch-tensorrt",)}, "made from graphs, and torch-tensorrt is not"),
        (
            {
                "quantize": "fp8",
                "targets": ("tensorrt-rtx",),
                "tensorrt": TensorrtSettings(compute_capabilities=("12.0", "8.6")),
            },
            "--compute-capability 8.6 has no fp8",
        ),
        ({"targets": ("onnx", "paper")}, "unknown target 'paper'; known: onnx"),
        ({"targets": ("",)}, "unknown target ''"),
        ({"token_path": "some"}, "--token-path is 'some'"),
        ({"model": "flux-tiny", "token_router": "small"}, "--token-router is 'small'; use published or compact"),
        ({"token_router": "compact"}, "dit-s-2 has one kind of token routers, published; leave --token-router out"),
        (
            {"model": "flux-tiny", "token_router": "compact", "finetune_steps": 0},
            "--token-router compact is about new token routers, and every token runs",
        ),
        (
            {"model": "flux-tiny", "token_router": "published", "widths": "static", "engines": 1},
            "--token-router published is about new token routers, and every token runs",
        ),
        ({"precision": "fp8"}, "--precision is 'fp8'; use fp32, fp16 or bf16"),
        ({"seed": -1}, "--seed is -1"),
        ({"seed": 2**64}, f"--seed is {2**64}"),
        ({"seed": 1.5}, "--seed is 1.5"),
        ({"memory": float("nan")}, "memory is nan"),
        ({"memory": -1}, "memory is -1"),
        ({"engines": 1.5}, "--engines is 1.5"),
        ({"engines": 10**20}, f"--engines is {10**20}"),
        ({"finetune_steps": 10**20}, f"--finetune-steps is {10**20}"),
        ({"td_lora": LoraSpec(rank=385, alpha=1)}, "--td-lora has rank 385 and dit-s-2 384 channels"),
        ({"finetune_steps": -1}, "--finetune-steps is -1"),
        ({"train_steps": 10}, "--train-steps is for training from scratch"),
        ({"checkpoint": "somewhere"}, "exclude each other"),
        ({"router": "sorted"}, "--router is 'sorted'; use free or ordered"),
        ({"router": "static"}, "--router is 'static'; use free or ordered"),
        ({"widths": "fixed"}, "--widths is 'fixed'; use dynamic or static"),
        ({"widths": "static"}, "static widths are one engine for all timesteps, and --engines is 4; use -k 1"),
        ({"widths": "static", "engines": 1, "router": "ordered"}, "--router ordered is about units at each timestep"),
        ({"widths": "static", "engines": 1, "token_path": "masked"}, "--token-path masked skips tokens"),
        ({"widths": "static", "engines": 1, "td_lora": LORA}, "--td-lora mixes 4 experts by timestep"),
        ({"td_lora": LORA, "finetune_steps": 0}, "nothing is trained; leave --td-lora out"),
        ({"merge_tolerance": 0.1}, "--merge-tolerance is for models with TD-LoRA"),
        ({"merge_tolerance": -1.0, "td_lora": LORA}, "--merge-tolerance is -1.0"),
        ({"random_weights": False, "data": "latents", "budget": None}, "needs a --budget"),
        ({"finetune_steps": 0, "budget": None}, "needs a --budget"),
        ({"random_weights": False}, "needs --data"),
        ({"random_weights": False, "model": "dit-digits", "data": "synthetic"}, "--checkpoint"),
    ],
)
def test_bad_values_are_named(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        settings(tmp_path, **values)
    assert list(tmp_path.iterdir()) == []


def test_large_models_are_stored_in_bf16_unless_told(tmp_path: Path) -> None:
    given = {"out": tmp_path / "b", "work": tmp_path / "w", "budget": 0.5, "finetune_steps": 0}
    assert BuildSettings(model="flux", **given).stored_precision == "bf16"
    assert BuildSettings(model="flux", precision="fp16", **given).stored_precision == "fp16"
    assert BuildSettings(model="flux-tiny", random_weights=True, **given).stored_precision == "fp32"


@pytest.mark.parametrize(
    ("model", "effort"), [("sit-digits", THOROUGH), ("dit-xl-2", DEFAULT_EFFORT), ("latte", SPARSE), ("flux", SPARSE)]
)
def test_the_heavier_a_pass_the_fewer(tmp_path: Path, model: str, effort: CalibrationEffort) -> None:
    given = BuildSettings(model=model, out=tmp_path / "b", work=tmp_path / "w", budget=0.5, finetune_steps=0)
    assert given.recipe.calibration == effort


@pytest.mark.parametrize("preset", [preset for preset in PRESETS.values() if preset.recipe.from_scratch is None])
def test_presets_follow_the_rule_for_any_checkpoint(preset: Preset) -> None:
    assert preset.recipe == recipe_for(preset.parameters, preset.tokens)


def test_a_bundle_is_named_after_model_and_budget() -> None:
    assert default_out("dit-s-2", [0.5]) == Path("dit-s-2-0.5")
    assert default_out("dit-s-2", [0.5, 0.3]) == Path("dit-s-2-0.5-0.3")
    assert default_out("dit-s-2", [None]) == Path("dit-s-2")
    assert default_out("dit-s-2", [0.5], "static") == Path("dit-s-2-0.5-static")


def test_a_work_directory_records_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = get_preset("flux-tiny").transformer_config()
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text(json.dumps(config))
    (tmp_path / "style.safetensors").touch()
    (tmp_path / "prompts.txt").write_text("a cat")
    asked = BuildSettings(
        model="flux-tiny",
        out=Path("bundle"),
        work=Path("work"),
        budget=0.5,
        checkpoint="weights",
        finetune_steps=7,
        data="synthetic:prompts.txt",
        td_lora=LORA,
        loras=(LoraFile(file=Path("style.safetensors"), scale=0.5),),
        targets=("onnx", "tensorrt-rtx"),
        tensorrt=TensorrtSettings(compute_capabilities=("8.9",), profiles=("batch=1:2:4",)),
        synthetic=SyntheticConfig(samples=3),
    )
    Path("work").mkdir()
    asked.save()
    monkeypatch.chdir("/")
    recorded = BuildSettings.load(tmp_path / "work")
    absolute: dict[str, Any] = {
        "out": tmp_path / "bundle",
        "work": tmp_path / "work",
        "checkpoint": str(tmp_path / "weights"),
        "data": f"synthetic:{tmp_path / 'prompts.txt'}",
        "loras": (LoraFile(file=tmp_path / "style.safetensors", scale=0.5),),
    }
    assert recorded == replace(asked, **absolute)
    (tmp_path / "work").rename(tmp_path / "elsewhere")
    assert BuildSettings.load(tmp_path / "elsewhere") == replace(recorded, work=tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "records no settings"),
        ("{", "records no settings"),
        ("[]", "records no settings"),
        ('{"version": 99, "settings": {}}', "settings of version 99"),
        ('{"version": 1, "settings": {"model": "sit-digits"}}', "out is wrong"),
        ('{"version": 1, "settings": {"model": "sit-digits", "out": "x", "engines": "many"}}', "engines is wrong"),
        ('{"version": 1, "settings": {"model": "sit-digit", "out": "x", "budget": 0.5}}', "did you mean"),
    ],
)
def test_settings_that_cannot_be_read_are_named(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / SETTINGS).write_text(text)
    with pytest.raises(UsageError, match=message):
        BuildSettings.load(tmp_path)


def test_an_output_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    settings(tmp_path)
    (tmp_path / "out" / "thesis.tex").write_text("...")
    with pytest.raises(UsageError, match="not empty and not a bundle"):
        settings(tmp_path)
    (tmp_path / "out" / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match="not empty and not a bundle"):
        settings(tmp_path)
    ours = {"schema_version": 1, "dyexport_version": "0.1", "files": {}}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(ours))
    settings(tmp_path)


def test_a_work_directory_inside_the_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lies in the bundle"):
        BuildSettings(model="sit-digits", budget=0.5, out=tmp_path, work=tmp_path / "work")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": "gone", "finetune_steps": 0}, "gone is no directory; give a directory of latents"),
        ({"data": ".", "finetune_steps": 0}, "holds no .safetensors files"),
        ({"data": "digits", "finetune_steps": 0}, "digits are (1, 8, 8) and dit-s-2 takes"),
        ({"model": "flux", "data": "synthetic:gone", "finetune_steps": 0}, "cannot read gone"),
        ({"checkpoint": "gone", "random_weights": False}, "gone does not exist"),
        ({"checkpoint": "a/gone.pt", "random_weights": False}, "gone.pt does not exist"),
    ],
)
def test_files_that_do_not_exist_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((DataError, CheckpointError), match=re.escape(message)):
        settings(tmp_path, **values)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("...")
    with pytest.raises(UsageError, match="is a file"):
        settings(tmp_path)


def test_output_and_work_are_two_places(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two directories"):
        BuildSettings(model="dit-s-2", budget=0.5, random_weights=True, out=tmp_path, work=tmp_path)


@pytest.mark.parametrize(
    ("values", "routers", "data"),
    [
        ({}, "random", None),
        ({"finetune_steps": 0}, "none", None),
        ({"random_weights": False, "data": "here"}, "trained", "here"),
        ({"random_weights": False, "model": "dit-digits"}, "trained", "digits"),
        ({"model": "dit-digits"}, "random", None),
        ({"model": "dit-digits", "finetune_steps": 5}, "trained", "digits"),
    ],
)
def test_where_routers_and_data_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], routers: str, data: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.safetensors").touch()
    found = settings(tmp_path, **values)
    assert (found.routers, found.data_source) == (routers, data)


def test_a_dynamic_checkpoint_is_taken_as_it_is(tmp_path: Path) -> None:
    checkpoint = tmp_path / "dynamic"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "dynamic.json").write_text('{"preset": "dit-s-2"}')
    given = {"random_weights": False, "checkpoint": str(checkpoint)}
    assert settings(tmp_path, **given, budget=None).routers == "given"
    for more in ({"finetune_steps": 10}, {"router": "ordered"}):
        with pytest.raises(UsageError, match="has routers already"):
            settings(tmp_path, **given, **more)


@pytest.mark.parametrize("stored", ["dynamic", "static"])
def test_a_dynamic_checkpoint_decides_the_widths(tmp_path: Path, stored: Widths) -> None:
    checkpoint = tmp_path / "dynamic"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    router = "static" if stored == "static" else "ordered"
    (checkpoint / "dynamic.json").write_text(json.dumps({"preset": "dit-s-2", "router": router}))
    given = {"checkpoint": str(checkpoint), "out": tmp_path / "out"}
    found = BuildSettings.complete(**given)
    assert (found.planned_widths, found.engines) == (stored, 1 if stored == "static" else get_preset("dit-s-2").engines)
    assert BuildSettings.complete(**given, widths=stored).planned_widths == stored
    other = "dynamic" if stored == "static" else "static"
    with pytest.raises(UsageError, match=f"has routers of {stored} widths and is taken as it is; leave --widths out"):
        BuildSettings.complete(**given, widths=other)


def test_static_widths_have_one_engine_and_a_plain_lora(tmp_path: Path) -> None:
    given = {"model": "flux", "budget": 0.5, "out": tmp_path / "out", "data": "synthetic"}
    static, dynamic = BuildSettings.complete(**given, widths="static"), BuildSettings.complete(**given)
    assert (static.engines, dynamic.engines) == (1, 4)
    assert static.lora is not None
    assert dynamic.lora is not None
    assert (static.lora, dynamic.lora.experts) == (dynamic.lora.model_copy(update={"experts": 1}), 4)


@pytest.mark.parametrize(
    ("text", "name", "scale"),
    [
        ("style.safetensors", "style.safetensors", 1.0),
        ("style.safetensors@0.8", "style.safetensors", 0.8),
        ("style.safetensors@-1", "style.safetensors", -1.0),
        ("v@2.safetensors@0.5", "v@2.safetensors", 0.5),
        ("style@2", "style@2", 1.0),  # there is such a file
        ("style@2@3", "style@2", 3.0),
    ],
)
def test_a_lora_may_have_a_scale(
    text: str, name: str, scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "style@2").touch()
    assert parse_lora_file(text) == LoraFile(file=Path(name), scale=scale)


def test_a_lora_that_cannot_be_merged_is_refused_before_anything_runs(tmp_path: Path) -> None:
    weights, file = tmp_path / "weights.safetensors", tmp_path / "lora.safetensors"
    save_file({"x": torch.zeros(1)}, weights)
    given: dict[str, Any] = {"random_weights": False, "checkpoint": str(weights), "finetune_steps": 0}
    with pytest.raises(UsageError, match=r"lora\.safetensors is not a file"):
        settings(tmp_path, **given, loras=(LoraFile(file=file),))
    with pytest.raises(UsageError, match="strong' is not a number"):
        parse_lora_file(f"{file}@strong")
    file.touch()
    for scale in (float("nan"), float("inf")):
        with pytest.raises(UsageError, match="scale is not finite"):
            settings(tmp_path, **given, loras=(LoraFile(file=file, scale=scale),))
    with pytest.raises(UsageError, match="give their --checkpoint"):
        settings(tmp_path, loras=(LoraFile(file=file),))
    assert settings(tmp_path, **given, loras=(LoraFile(file=file), LoraFile(file=file, scale=0.5))).loras


@pytest.mark.parametrize("name", ["x" * 5000, "loop/deeper", "a\0b"])
def test_names_that_nothing_can_have_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    place = tmp_path / name
    given: dict[str, Any] = {"model": "dit-digits", "budget": 0.5, "finetune_steps": 0}
    for places in ({"out": place, "work": tmp_path / "work"}, {"out": tmp_path / "out", "work": place}):
        with pytest.raises(UsageError, match="can be no directory") as caught:
            BuildSettings(**given, random_weights=True, **places)
        assert len(str(caught.value)) < 300
    with pytest.raises(DyexportError):
        open_source(str(place), get_preset("dit-digits"))
    with pytest.raises(DyexportError):
        checkpoint_source(settings(tmp_path, **given, random_weights=False, checkpoint=str(place)))


def test_new_token_routers_are_compact_where_there_is_a_choice(tmp_path: Path) -> None:
    flux = settings(tmp_path, model="flux-tiny")
    assert flux.token_router_kind == "compact"
    assert replace(flux, token_router="published").token_router_kind == "published"
    assert replace(flux, finetune_steps=0).token_router_kind is None
    assert settings(tmp_path, model="qwen-image-tiny").token_router_kind == "compact"
    assert settings(tmp_path).token_router_kind == "published"


def test_work_directories_older_than_compact_token_routers_keep_theirs(tmp_path: Path) -> None:
    """Their settings name no kind, and their finished stages were recorded without one."""
    flux = settings(tmp_path, model="flux-tiny")
    assert dynamic_settings(flux)["token_router"] == "compact"
    flux.save()
    assert BuildSettings.load(flux.work) == flux
    record = json.loads((flux.work / SETTINGS).read_text())
    del record["settings"]["token_router"]
    (flux.work / SETTINGS).write_text(json.dumps(record))
    older = BuildSettings.load(flux.work)
    assert older.token_router_kind == "published"
    assert "token_router" not in dynamic_settings(older)
