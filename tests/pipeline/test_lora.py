"""TD-LoRA end to end: trained on a frozen backbone, exported, and run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from dyexport.backbones import get_adapter
from dyexport.backbones.recipe import PUBLISHED
from dyexport.bundle.manifest import DENSE, DENSE_CONDITIONING
from dyexport.bundle.reader import Bundle
from dyexport.checkpoints.dynamic import TD_LORA, load_dynamic
from dyexport.checkpoints.static import load_static, save_static
from dyexport.cli import main
from dyexport.errors import CheckpointError, UsageError
from dyexport.lora import LoraFile, LoraSpec
from dyexport.models.inputs import NoisedInputs
from dyexport.models.random_weights import random_backbone
from dyexport.pipeline.build import calibrate_model, finetune_model, make_static_model, opened, price_plans
from dyexport.pipeline.export_stages import planned_networks, segment_plan
from dyexport.pipeline.networks import STATIC_PREFIX
from dyexport.pipeline.settings import BuildSettings
from dyexport.runtime.loading import load
from dyexport.stages.ledger import NullListener
from dyexport.training.synthetic import SyntheticConfig, generate
from dyexport.verification.report import TOLERANCES
from dyexport.verification.settings import VerifySettings
from dyexport.verification.verify import find_reference, verify_bundle
from tests.built import built_once
from tests.pipeline.tiny import TINY, build, hashes, shallow, tiny_settings

SPEC = LoraSpec(rank=2, experts=3, alpha=4)


@pytest.fixture(scope="module")
def built(shared_folder: Path) -> Bundle:
    return built_once(shared_folder / "td-lora", engines=3, baseline=True, td_lora=SPEC)


def test_engines_equal_the_masked_model(built: Bundle) -> None:
    assert verify_bundle(built.root, VerifySettings(timesteps=48)).passed


@pytest.mark.parametrize("variant", ["inverse", "symmetric"])
def test_so_do_those_of_the_variants(variant: str, tmp_path: Path) -> None:
    spec = LoraSpec.model_validate({**SPEC.model_dump(), "variant": variant})
    assert verify_bundle(build(tiny_settings(tmp_path, td_lora=spec)).root, VerifySettings(timesteps=16)).passed


@torch.no_grad()
def test_verification_would_see_updates_go_missing(built: Bundle) -> None:
    model, _ = load_dynamic(find_reference(built))
    inputs = {"hidden_states": torch.randn(2, 1, 8, 8), "timestep": torch.full((2,), 0.4)}
    inputs["class_labels"] = torch.tensor([1, 2])
    truth = model(inputs).sample
    for value in model.td_lora.parameters():
        value.zero_()
    assert (model(inputs).sample - truth).abs().max() > 100 * TOLERANCES["fp32"]


@torch.no_grad()
def test_the_dense_network_is_the_frozen_backbone(built: Bundle) -> None:
    """And its weights are stored once: the store holds no second copy of what was never moved."""
    latents, t, labels = torch.randn(2, 1, 8, 8), torch.full((2,), 0.7), torch.tensor([1, 2])
    static = load_static(str(find_reference(built)), TINY)
    assert DENSE_CONDITIONING in built.engine_paths("onnx")
    dense = load(built.root, dense=True)
    assert (dense(latents, t, labels).sample - static(latents, t, labels).sample).abs().max() < 1e-5
    weights = sum(parameter.nbytes for parameter in static.parameters())
    assert (built.root / "graphs/weights.bin").stat().st_size < 2 * weights


def test_a_trained_one_says_how_much_it_trained(tmp_path: Path) -> None:
    settings = trained_settings(tmp_path)
    bundle = build(settings)
    assert verify_bundle(bundle.root, VerifySettings(timesteps=8)).passed
    static, _ = load_dynamic(find_reference(bundle))
    small = sum(value.numel() for part in (static.routers, static.td_lora) for value in part.parameters())
    whole = sum(value.numel() for part in (static.routers, static.backbone) for value in part.parameters())
    assert bundle.manifest.metrics["trainable_parameters"] == small
    assert bundle.manifest.metrics["trainable_share"] == pytest.approx(small / whole)
    assert bundle.manifest.model.td_lora == SPEC


def test_one_with_biases_has_the_static_model_as_its_dense_network(tmp_path: Path) -> None:
    settings = replace(trained_settings(tmp_path), td_lora=SPEC.model_copy(update={"bias": "all"}), baseline=True)
    bundle = build(settings)
    assert verify_bundle(bundle.root, VerifySettings(timesteps=8)).passed
    model, _ = load_dynamic(find_reference(bundle))
    moved = [*model.routers.parameters(), *model.td_lora.parameters()]
    moved += [value for name, value in model.backbone.named_parameters() if name.endswith(".bias")]
    assert bundle.manifest.metrics["trainable_parameters"] == sum(value.numel() for value in moved)
    static, tuned = (load_static(str(path), TINY) for path in (settings.work / "static", find_reference(bundle)))
    inputs = torch.randn(2, 1, 8, 8), torch.full((2,), 0.7), torch.tensor([1, 2])
    with torch.no_grad():
        truth, moved_on = static(*inputs).sample, tuned(*inputs).sample
    assert (load(bundle.root, dense=True)(*inputs).sample - truth).abs().max() < 1e-5
    assert (moved_on - truth).abs().max() > 1e-4
    with opened(settings, NullListener()) as run:
        model = calibrate_model(run)
        networks = planned_networks(settings, model, bundle.manifest.plan)
        dense = next(network for network in networks if network.name == DENSE)
    sources = {source for recipe in dense.slice.recipes.values() for source in recipe.sources}
    stored_again = {source for source in sources if source.startswith(STATIC_PREFIX)}
    assert stored_again == {source for source in sources if source.endswith(".bias")} != set()


def test_merging_is_measured_and_then_exact(tmp_path: Path) -> None:
    """A merged bundle equals the model at the mean gates to the last digit; what the mean costs is written down."""
    settings = tiny_settings(tmp_path, td_lora=SPEC, engines=3)
    with opened(settings, NullListener()) as run:
        path = segment_plan(run, calibrate_model(run))
    merged = build(replace(settings, merge_tolerance=1.0))
    assert all(segment.merged for segment in merged.manifest.plan.segments)
    assert verify_bundle(merged.root, VerifySettings(timesteps=32)).passed
    errors = merged.manifest.plan.merge_errors
    assert len(errors) == 3
    model, preset = load_dynamic(find_reference(merged))
    segment, found = merged.manifest.plan.segments[1], load(merged.root)
    apart = norm = 0.0
    for draw in range(32):
        t = segment.start + (draw + 0.5) / 32 * (segment.end - segment.start)
        inputs = NoisedInputs(preset=preset, batch_size=4, seed=7).at(t)
        with torch.no_grad():
            truth = model(inputs).sample
        apart += float((found(**inputs).sample - truth).square().sum())
        norm += float(truth.square().sum())
    assert apart / norm > 1e-6
    assert 0.2 < apart / norm / errors[1] < 5
    assert merged.manifest.plan.disk_bytes > path.disk_bytes
    assert not path.merge_errors


@pytest.mark.parametrize(
    ("model", "tolerance"),
    [
        ("flux-tiny", None),
        ("flux-tiny", 1.0),
        ("latte-tiny", None),
        ("qwen-image-tiny", None),
        ("qwen-image-tiny", 1.0),
    ],
)
def test_other_backbones_too(model: str, tolerance: float | None, tmp_path: Path) -> None:
    bundle = build(tiny_settings(tmp_path, model=shallow(model), td_lora=SPEC, merge_tolerance=tolerance))
    assert [segment.merged for segment in bundle.manifest.plan.segments] == [tolerance is not None]
    assert verify_bundle(bundle.root, VerifySettings(timesteps=6)).passed


@pytest.mark.parametrize("model", ["flux-tiny", "latte-tiny"])
def test_their_biases_can_be_trained_too(model: str, tmp_path: Path) -> None:
    """The bundle is the model with its trained biases, its dense network the one before."""
    schedule = replace(PUBLISHED, batch_size=2, learning_rate=1e-2)
    preset, spec = shallow(model), SPEC.model_copy(update={"bias": "all"})
    preset = replace(preset, recipe=replace(preset.recipe, finetune_lora=schedule))
    backbone = random_backbone(preset)
    save_static(backbone, tmp_path / "stock")
    generate(backbone, preset, SyntheticConfig(samples=4, steps=1), tmp_path / "data", lambda *_: None)
    sources = {"checkpoint": str(tmp_path / "stock"), "data": str(tmp_path / "data")}
    given = {
        "model": preset,
        "random_weights": False,
        "baseline": True,
        "finetune_steps": 3,
        "td_lora": spec,
        **sources,
    }
    bundle = build(tiny_settings(tmp_path, **given))
    assert verify_bundle(bundle.root, VerifySettings(timesteps=6)).passed
    tuned = load_static(str(find_reference(bundle)), preset)
    inputs = NoisedInputs(preset=preset, batch_size=2).at(0.6 * preset.timestep_range[1])
    with torch.no_grad():
        truth, moved_on = (get_adapter(preset.backbone).run(each, inputs) for each in (backbone, tuned))
    assert (load(bundle.root, dense=True)(**inputs).sample - truth).abs().max() < 1e-4
    assert (moved_on - truth).abs().max() > 1e-3


def test_what_costs_too_much_is_not_merged(tmp_path: Path) -> None:
    loose = tiny_settings(tmp_path, td_lora=SPEC, engines=3, merge_tolerance=1.0)
    with opened(loose, NullListener()) as run:
        errors = segment_plan(run, calibrate_model(run)).merge_errors
    assert len(set(errors)) == 3
    between = sorted(errors)[1]
    bundle = build(replace(loose, merge_tolerance=between))
    assert [segment.merged for segment in bundle.manifest.plan.segments] == [error <= between for error in errors]
    assert verify_bundle(bundle.root, VerifySettings(timesteps=32)).passed


def test_one_expert_needs_no_path(tmp_path: Path) -> None:
    bundle = build(tiny_settings(tmp_path, td_lora=LoraSpec(rank=2, experts=1, alpha=4)))
    assert bundle.manifest.model.td_lora is None
    assert verify_bundle(bundle.root, VerifySettings(timesteps=8)).passed
    static, _ = load_dynamic(find_reference(bundle))
    assert static.td_lora is None


def test_it_is_part_of_what_a_build_is_made_from(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, td_lora=SPEC)
    digests = []
    for spec in (SPEC, replace_alpha(SPEC), None, SPEC):
        with opened(replace(settings, td_lora=spec), NullListener()) as run:
            digests.append(finetune_model(run).dynamic.digest)
    assert len(set(digests)) == 3
    assert digests[0] == digests[3]


def replace_alpha(spec: LoraSpec) -> LoraSpec:
    return spec.model_copy(update={"alpha": spec.alpha + 1})


def test_a_checkpoint_keeps_its_updates(built: Bundle, tmp_path: Path) -> None:
    checkpoint = find_reference(built)
    given = tiny_settings(tmp_path, budget=None, random_weights=False, checkpoint=str(checkpoint))
    bundle = build(given)
    assert bundle.manifest.model.td_lora == SPEC
    assert verify_bundle(bundle.root, VerifySettings(timesteps=8)).passed


def test_a_checkpoint_without_them_is_named(built: Bundle, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for file in find_reference(built).iterdir():
        if file.is_file() and file.name != TD_LORA:
            (checkpoint / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=TD_LORA):
        load_dynamic(checkpoint)
    spec = json.loads((checkpoint / "dynamic.json").read_text())
    assert spec["td_lora"]["rank"] == SPEC.rank


def trained_settings(root: Path) -> BuildSettings:
    return tiny_settings(root, budget=1.0, random_weights=False, train_steps=3, finetune_steps=3, td_lora=SPEC)


def test_a_users_lora_comes_and_goes(tmp_path: Path) -> None:
    """A -> B -> A: without the LoRA the bundle has the bytes it had before; with it, others."""
    save_static(random_backbone(TINY), tmp_path / "stock")
    name = "transformer_blocks.1.attn1.to_v"
    factors = {f"{name}.lora_A.weight": torch.randn(2, 48), f"{name}.lora_B.weight": torch.randn(48, 2)}
    save_file(factors, tmp_path / "lora.safetensors")
    plain = tiny_settings(tmp_path, random_weights=False, checkpoint=str(tmp_path / "stock"), finetune_steps=0)
    file = tmp_path / "lora.safetensors"
    with_lora, halved = (replace(plain, loras=(LoraFile(file=file, scale=scale),)) for scale in (1.0, 0.5))
    found = []
    for settings in (plain, with_lora, halved, plain):
        bundle = build(settings)
        assert verify_bundle(bundle.root, VerifySettings(timesteps=4)).passed
        found.append(hashes(bundle.root))
    assert found[0] == found[3]
    weights = [each["graphs/weights.bin"] for each in found]
    assert len(set(weights)) == 3


@torch.no_grad()
def test_in_a_dynamic_checkpoint_widths_stay(built: Bundle, tmp_path: Path) -> None:
    name = "transformer_blocks.1.attn1.to_v"
    factors = {f"{name}.lora_A.weight": torch.randn(2, 48), f"{name}.lora_B.weight": torch.randn(48, 2)}
    save_file(factors, tmp_path / "lora.safetensors")
    reference = find_reference(built)
    given = tiny_settings(tmp_path, budget=None, random_weights=False, checkpoint=str(reference))
    bundle = build(replace(given, loras=(LoraFile(file=tmp_path / "lora.safetensors"),)))
    assert verify_bundle(bundle.root, VerifySettings(timesteps=8)).passed
    assert (bundle.widths.heads == built.widths.heads).all()
    assert (bundle.widths.groups == built.widths.groups).all()
    before, _ = load_dynamic(reference)
    after, _ = load_dynamic(find_reference(bundle))
    change = after.backbone.get_submodule(name).weight - before.backbone.get_submodule(name).weight
    product = factors[f"{name}.lora_B.weight"] @ factors[f"{name}.lora_A.weight"]
    torch.testing.assert_close(change, product, atol=1e-5, rtol=1e-5)


MODULE = "transformer_blocks.1.attn1.to_v"


def lora_of_ones(file: Path, **config: Any) -> Path:
    """A LoRA that adds 1 to every weight of a layer, where the configuration does not say otherwise."""
    file.parent.mkdir(exist_ok=True)
    save_file({f"{MODULE}.lora_A.weight": torch.ones(1, 48), f"{MODULE}.lora_B.weight": torch.ones(48, 1)}, file)
    if config:
        (file.parent / "adapter_config.json").write_text(json.dumps({"r": 1, "lora_alpha": 1, **config}))
    return file


def test_several_come_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_static(random_backbone(TINY), tmp_path / "stock")
    first, second = lora_of_ones(tmp_path / "first.safetensors"), lora_of_ones(tmp_path / "se@5cond.safetensors")
    command = ["finetune", "-m", TINY.name, "-b", "0.5", "--finetune-steps", "0", "--checkpoint", tmp_path / "stock"]
    command += [
        "--work",
        tmp_path / "work",
        "--lora",
        f"{first}@0.25",
        "--lora",
        second,
        "--lora",
        f"{first}@-3",
        "--json",
    ]
    monkeypatch.setattr("sys.argv", ["dyexport", *map(str, command)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert not exit_.value.code
    checkpoint = json.loads(capsys.readouterr().out)["checkpoint"]
    change = (
        load_static(checkpoint, TINY).get_submodule(MODULE).weight - random_backbone(TINY).get_submodule(MODULE).weight
    )
    torch.testing.assert_close(change, torch.full((48, 48), 0.25 + 1 - 3), atol=1e-5, rtol=1e-5)


def test_what_is_read_decides_whether_they_are_merged_again(tmp_path: Path) -> None:
    """Their contents and scales do, and a configuration next to one; their order and places do not."""
    save_static(random_backbone(TINY), tmp_path / "stock")
    plain = tiny_settings(tmp_path, random_weights=False, checkpoint=str(tmp_path / "stock"), finetune_steps=0)
    names = [
        tmp_path / "peft/adapter_model.safetensors",
        tmp_path / "other/plain.safetensors",
        tmp_path / "moved.safetensors",
    ]

    def made(*loras: LoraFile) -> tuple[bool, str]:
        with opened(replace(plain, loras=loras), NullListener()) as run:
            static = make_static_model(run).static
            return not static.reused, static.digest

    first = LoraFile(file=lora_of_ones(names[0], lora_alpha=2))
    second = LoraFile(file=lora_of_ones(names[1], lora_alpha=3), scale=0.5)
    begin = made(first, second)
    assert begin[0]
    assert made(second, first) == (False, begin[1])
    names[1].rename(names[2])
    assert made(first, replace(second, file=names[2])) == (False, begin[1])
    lora_of_ones(names[0], lora_alpha=4)
    changed = made(first, replace(second, file=names[2]))
    assert changed[0]
    assert changed[1] != begin[1]
    assert made(first, LoraFile(file=names[2]))[0]


@torch.no_grad()
def test_one_for_the_conditioning_of_flux_reaches_the_engines(tmp_path: Path) -> None:
    """Written by peft, under its own names."""
    preset = shallow("flux-tiny")
    inputs = NoisedInputs(preset=preset, batch_size=2).at(0.6)
    save_static(random_backbone(preset), tmp_path / "stock")
    names = ["timestep_embedder.linear_1", "norm1.linear", "x_embedder", "norm_out.linear"]
    config = LoraConfig(r=2, lora_alpha=8, target_modules=names, init_lora_weights=False)
    adapted: Any = get_peft_model(random_backbone(preset), config)
    adapted.save_pretrained(str(tmp_path / "peft"))
    lora = LoraFile(file=tmp_path / "peft/adapter_model.safetensors")
    settings = tiny_settings(
        tmp_path,
        model=preset,
        random_weights=False,
        checkpoint=str(tmp_path / "stock"),
        finetune_steps=0,
        baseline=True,
        loras=(lora,),
    )
    bundle = build(settings)
    truth, stock = (
        get_adapter(preset.backbone).run(model, inputs)
        for model in (adapted.merge_and_unload(), random_backbone(preset))
    )
    assert (load(bundle.root, dense=True)(**inputs).sample - truth).abs().max() < 1e-4
    assert (truth - stock).abs().max() > 1e-2


def test_a_model_without_td_lora_has_nothing_to_merge(tmp_path: Path) -> None:
    with opened(tiny_settings(tmp_path / "first"), NullListener()) as run:
        routed = str(finetune_model(run).dynamic.path)
    given = {"checkpoint": routed, "random_weights": False, "merge_tolerance": 0.1}
    with (
        opened(tiny_settings(tmp_path / "second", **given), NullListener()) as run,
        pytest.raises(UsageError, match=r"--merge-tolerance does nothing here: .* has no TD-LoRA"),
    ):
        price_plans(run, [1])
