"""A user's LoRA against what diffusers and peft make of the same file."""

from __future__ import annotations

import json
import re
import warnings
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from dyexport.backbones.base import Preset
from dyexport.checkpoints.dynamic import save_dynamic
from dyexport.checkpoints.static import adopt_static, load_static, save_static
from dyexport.checkpoints.stored_weights import StoredWeights
from dyexport.checkpoints.weight_files import WEIGHTS, link_weights, write_shards
from dyexport.errors import CheckpointError
from dyexport.lora import LoraFile
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.inputs import NoisedInputs
from dyexport.models.random_weights import random_backbone, random_dynamic
from dyexport.presets import get_preset
from tests.checkpoints import lora_styles as styles
from tests.factories import rank_units
from tests.pipeline.tiny import TINY

FLUX = get_preset("flux-tiny")
TARGETS = {TINY.name: ["to_q", "to_out.0", "net.0.proj"], FLUX.name: ["to_q", "to_add_out", "proj_mlp", "proj_out"]}


def config(preset: Preset) -> LoraConfig:
    return LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS[preset.name], init_lora_weights=False)


def adopted(preset: Preset, root: Path, file: Path, source: Path | None = None, scale: float = 1.0) -> Any:
    """The static model with the LoRA in it."""
    if source is None:
        source = root / "plain"
        save_static(random_backbone(preset), source)
    adopt_static(str(source), preset, root / "merged", [LoraFile(file=file, scale=scale)])
    return load_static(str(root / "merged"), preset)


def assert_same(found: torch.nn.Module, expected: torch.nn.Module, base: torch.nn.Module) -> None:
    moved = 0
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, atol=1e-6, rtol=1e-5)
        moved += not torch.allclose(value, base.state_dict()[name], atol=1e-4)
    assert moved > 3


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_as_peft_writes_it(scale: float, tmp_path: Path) -> None:
    adapted = get_peft_model(random_backbone(TINY), config(TINY))
    adapted.save_pretrained(tmp_path / "peft")
    if scale != 1.0:
        for module in adapted.modules():
            if hasattr(module, "scale_layer"):
                module.scale_layer(scale)
    found = adopted(TINY, tmp_path, tmp_path / "peft" / "adapter_model.safetensors", scale=scale)
    assert_same(found, adapted.merge_and_unload(), random_backbone(TINY))


@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_as_diffusers_writes_it_for_flux(scale: float, tmp_path: Path) -> None:
    stock: Any = random_backbone(FLUX)
    stock.add_adapter(config(FLUX))
    stock.save_lora_adapter(tmp_path / "lora")
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    again: Any = random_backbone(FLUX)
    again.load_lora_adapter(str(tmp_path / "lora"), weight_name=file.name, prefix=None)
    again.fuse_lora(lora_scale=scale)
    again.unload_lora()
    assert_same(adopted(FLUX, tmp_path, file, scale=scale), again, random_backbone(FLUX))


def test_in_a_fine_tuned_checkpoint_units_stand_in_another_order(tmp_path: Path) -> None:
    """A LoRA made for the published model is the same function in the model whose units were ranked."""
    adapted = get_peft_model(random_backbone(TINY), config(TINY))
    adapted.save_pretrained(tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    model: DynamicTransformer = random_dynamic(TINY)
    rank_units(model, NoisedInputs(preset=TINY, batch_size=2), [0.3, 0.8])
    save_dynamic(model, tmp_path / "dynamic", TINY)
    assert model.order is not None
    assert not torch.equal(model.order["heads"][0], torch.arange(TINY.heads))
    inputs = NoisedInputs(preset=TINY, batch_size=2).at(0.4)
    with torch.no_grad():
        expected = adapted.merge_and_unload()(**inputs).sample
        found = adopted(TINY, tmp_path, file, source=tmp_path / "dynamic")(**inputs).sample
        plain = random_backbone(TINY)(**inputs).sample
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (expected - plain).abs().max() > 1e-3


NAME = "transformer_blocks.0.attn1.to_q"
CONFIG = LoraConfig(r=2, target_modules=["to_q"]).to_dict() | {"target_modules": ["to_q"], "peft_type": "LORA"}


def factors(name: str = NAME, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    """A LoRA that adds 2 to every weight."""
    return {f"{name}.lora_A.weight": torch.ones(2, 48), f"{name}.lora_B.weight": torch.ones(48, 2), **changes}


def named(suffix: str, tensor: torch.Tensor, name: str = NAME) -> dict[str, torch.Tensor]:
    return {f"{name}.{suffix}": tensor}


def refusal(tensors: dict[str, torch.Tensor], root: Path, preset: Preset = TINY, name: str = "lora.safetensors") -> str:
    """The sentence that a file is refused with."""
    save_file(tensors, root / name)
    with pytest.raises(CheckpointError) as error:
        adopted(preset, root, root / name)
    assert "\n" not in str(error.value)
    assert name in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no LoRA"),
        (factors() | {"pos_embed.pos": torch.ones(1)}, r"pos_embed\.pos is no factor"),
        ({f"{NAME}.lora_A.weight": torch.ones(2, 48)}, rf"{NAME}\.lora_A\.weight needs lora_B\.weight"),
        ({f"{NAME}.lora_B.weight": torch.ones(48, 2)}, rf"{NAME}\.lora_B\.weight needs two matrices, A and B"),
        (factors() | named("lora_B.weight", torch.ones(40, 2)), r"lora_B\.weight has shape \(40, 2\).* \(48, 2\)"),
        (factors() | named("lora_B.weight", torch.ones(48, 3)), r"lora_B\.weight has shape \(48, 3\).* \(48, 2\)"),
        (factors() | named("lora_A.weight", torch.ones(2, 40)), r"lora_A\.weight has shape \(2, 40\)"),
        (factors() | named("lora_A.weight", torch.tensor(1.0)), r"lora_A\.weight needs two matrices"),
        (factors("x"), r"x\.lora_A\.weight is of no layer of sit-tiny; give a LoRA made for this model"),
        (factors("transformer_blocks.0.attn1"), r"attn1\.lora_A\.weight is for a layer of type Attention"),
    ],
)
def test_what_does_not_fit_is_named(tensors: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    assert re.search(message, refusal(tensors, tmp_path))


@pytest.mark.parametrize(
    ("tensors", "key"),
    [
        (factors() | named("lora_A.weight", torch.full((2, 48), float("nan"))), f"{NAME}.lora_A.weight"),
        (factors() | named("lora_B.weight", torch.full((48, 2), float("inf"))), f"{NAME}.lora_B.weight"),
        (factors() | named("lora_A.weight", torch.full((2, 48), 1e300, dtype=torch.float64)), f"{NAME}.lora_A.weight"),
        (factors() | named("lora_A.weight", torch.ones(2, 48, dtype=torch.complex64)), f"{NAME}.lora_A.weight"),
        (factors() | named("lora_B.weight", torch.ones(48, 2, dtype=torch.int8)), f"{NAME}.lora_B.weight"),
        (
            named("lora_A.weight", torch.ones(0, 48)) | named("lora_B.weight", torch.ones(48, 0)),
            f"{NAME}.lora_A.weight",
        ),
        (factors() | named("alpha", torch.ones(0)), f"{NAME}.alpha"),
        (factors() | named("alpha", torch.ones(2)), f"{NAME}.alpha"),
        (factors() | named("alpha", torch.tensor(float("nan"))), f"{NAME}.alpha"),
        (factors() | named("alpha", torch.tensor(1j)), f"{NAME}.alpha"),
        (factors() | named("alpha", torch.tensor(True)), f"{NAME}.alpha"),
        (
            named("lora_A.one.weight", torch.ones(2, 48)) | named("lora_B.two.weight", torch.ones(48, 2)),
            f"{NAME}.lora_B.two.weight",
        ),
        (factors() | named("alpha", torch.ones(1), "transformer_blocks.0.attn1.to_k"), "attn1.to_k.alpha"),
        (factors() | named("alpha", torch.ones(1), "nowhere"), "nowhere.alpha"),
    ],
)
def test_numbers_that_no_lora_has_are_refused_by_key(
    tensors: dict[str, torch.Tensor], key: str, tmp_path: Path
) -> None:
    assert key in refusal(tensors, tmp_path)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (f"{NAME}.lora_A.weight", f"base_model.model.{NAME}.lora_A.weight"),
        (f"transformer.{NAME}.lora_B.weight", f"{NAME}.lora_up.weight"),
        (f"{NAME}.lora_A.default.weight", f"{NAME}.lora_A.other.weight"),
        (f"{NAME}.alpha", f"{NAME}.lora.alpha"),
        (f"{NAME}.lora_A.weight", f"lora_unet_{NAME.replace('.', '_')}.lora_down.weight"),
    ],
)
def test_two_factors_for_one_place_are_refused(first: str, second: str, tmp_path: Path) -> None:
    shapes = {"A": (2, 48), "down": (2, 48), "B": (48, 2), "up": (48, 2), "alpha": ()}
    shape = next(shape for part, shape in shapes.items() if re.search(rf"\.(lora_)?{part}", first))
    message = refusal(factors() | {first: torch.ones(shape), second: torch.ones(shape) * 2}, tmp_path)
    assert len([key for key in (first, second, f"{NAME}.lora") if key in message]) >= 2


def test_so_are_two_under_names_of_two_trainers(tmp_path: Path) -> None:
    kohya = {
        f"lora_unet_double_blocks_0_img_attn_proj.lora_{kind}.weight": torch.ones(shape)
        for kind, shape in (("down", (2, 128)), ("up", (128, 2)))
    }
    name = "transformer_blocks.0.attn.to_out.0"
    own = named("lora_A.weight", torch.ones(2, 128), name) | named("lora_B.weight", torch.ones(128, 2), name)
    assert name in refusal(kohya | own, tmp_path, FLUX)


KOHYA = "lora_unet_double_blocks_0_img_attn_proj"
OTHERS = {
    "dora_scale": (128, 1),
    "diff_b": (128,),
    "diff": (128, 128),
    "set_weight": (128, 128),
    "lora_mid.weight": (2, 2),
    "hada_w1_a": (128, 2),
    "lokr_w1": (4, 4),
    "oft_blocks": (4, 4),
    "reshape_weight": (2,),
}


@pytest.mark.parametrize("suffix", OTHERS)
@pytest.mark.parametrize(
    "name",
    [
        KOHYA,
        "transformer.transformer_blocks.0.attn.to_q",
        "lora_transformer_transformer_blocks_0_attn_to_q",
        "diffusion_model.double_blocks.0.img_attn.proj",
        "base_model.model.double_blocks.0.img_attn.proj",
    ],
)
def test_what_is_more_than_a_lora_is_refused_by_key(suffix: str, name: str, tmp_path: Path) -> None:
    """Also where it is all zeros: converters drop such keys without a word."""
    lora = {f"{name}.lora_down.weight": torch.ones(2, 128), f"{name}.lora_up.weight": torch.ones(128, 2)}
    assert f"{name}.{suffix}" in refusal(lora | named(suffix, torch.zeros(OTHERS[suffix]), name), tmp_path, FLUX)


@pytest.mark.parametrize(
    "key", ["transformer.transformer_blocks.0.attn.norm_q.weight", f"{NAME}.bias", f"{NAME}.weight"]
)
def test_so_are_weights_saved_whole(key: str, tmp_path: Path) -> None:
    assert key in refusal(factors() | {key: torch.ones(48)}, tmp_path)


def test_names_that_diffusers_does_not_know_are_named(tmp_path: Path) -> None:
    known = {f"{KOHYA}.lora_down.weight": torch.ones(2, 128), f"{KOHYA}.lora_up.weight": torch.ones(128, 2)}
    narrow = "lora_unet_single_blocks_0_linear1"  # which diffusers splits at FLUX's own width
    for other in ("lora_unet_triple_blocks_0_proj", "double_blocks.0.processor.proj_lora3", narrow, "unet.mid_block"):
        more = {f"{other}.lora_down.weight": torch.ones(2, 128), f"{other}.lora_up.weight": torch.ones(128, 2)}
        assert other in refusal(known | more, tmp_path, FLUX)


TEXT = {
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": KOHYA,
    "lora_te3_encoder_block_0_layer_0_SelfAttention_k.alpha": KOHYA,
    "text_encoder.text_model.encoder.layers.0.self_attn.k_proj.lora_A.weight": NAME.replace("attn1", "attn"),
    "text_encoder_2.encoder.block.0.lora_B.weight": NAME.replace("attn1", "attn"),
    "text_encoders.clip_l.transformer.text_model.embeddings.diff": "diffusion_model.double_blocks.0.img_attn.proj",
    "text_encoders.t5xxl.transformer.encoder.lora_up.weight": "diffusion_model.double_blocks.0.img_attn.proj",
    "bundle_emb.<token>.clip_l": "lora_transformer_transformer_blocks_0_attn_to_q",
}


@pytest.mark.parametrize(("key", "name"), TEXT.items())
def test_a_text_encoders_part_is_left_out_with_a_warning(key: str, name: str, tmp_path: Path) -> None:
    lora = {f"{name}.lora_down.weight": torch.ones(2, 128), f"{name}.lora_up.weight": torch.ones(128, 2)}
    save_file(lora, tmp_path / "plain.safetensors")
    save_file(lora | {key: torch.ones(2)}, tmp_path / "lora.safetensors")
    with pytest.warns(UserWarning, match=rf"lora\.safetensors.*{re.escape(key)}"):
        found = adopted(FLUX, tmp_path, tmp_path / "lora.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = adopted(FLUX, tmp_path / "again", tmp_path / "plain.safetensors")
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), atol=0, rtol=0)
    assert key in refusal({key: torch.ones(2)}, tmp_path, FLUX)


MOVED = ["pissa", "pissa_niter_4", "olora"]


@pytest.mark.parametrize("start", MOVED)
def test_an_initialization_that_moves_the_base_is_refused_by_name(start: str, tmp_path: Path) -> None:
    model = get_peft_model(random_backbone(TINY), LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=start))
    for write in (styles.peft, styles.diffusers):
        with pytest.raises(CheckpointError, match=rf"'{start}' moves the base weights"):
            adopted(TINY, tmp_path / write.__name__, write(model, tmp_path))


@pytest.mark.parametrize("start", ["corda", "loftq", "lora_ga", "something new"])
def test_so_is_one_that_is_not_known_to_keep_it(start: str, tmp_path: Path) -> None:
    file = styles.peft(styles.adapted(TINY, ".*to_q"), tmp_path)
    styles.change_config(file, init_lora_weights=start)
    with pytest.raises(CheckpointError, match=rf"'{start}' moves the base weights"):
        adopted(TINY, tmp_path, file)


def test_one_that_peft_has_converted_is_merged(tmp_path: Path) -> None:
    """As its refusal says."""
    model: Any = get_peft_model(
        random_backbone(TINY), LoraConfig(r=2, target_modules=["to_q"], init_lora_weights="pissa")
    )
    model.peft_config["default"].init_lora_weights = True  # as peft's documentation has it
    model.save_pretrained(str(tmp_path / "start"))
    model.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += torch.ones_like(parameter) / 10
    model.save_pretrained(str(tmp_path / "peft"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    found = adopted(TINY, tmp_path, tmp_path / "peft/adapter_model.safetensors")
    truth, plain = model.merge_and_unload().state_dict(), random_backbone(TINY).state_dict()
    assert (truth[f"{NAME}.weight"] - plain[f"{NAME}.weight"]).abs().max() > 1e-3
    torch.testing.assert_close(found.state_dict(), truth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "LOHA"}, "is a LOHA"),
        ({"r": 3}, r"lora_A\.weight has r 4, its configuration says 3"),
        ({"rank_pattern": {"to_q": 2}}, r"to_q\.lora_A\.weight has r 4, its configuration says 2"),
        ({"use_dora": True}, r"to_q\.lora_A\.weight has use_dora False, its configuration says True"),
        ({"lora_bias": True}, r"to_q\.lora_A\.weight has lora_bias False"),
        ({"target_modules": ["to_k"]}, r"to_q\.lora_A\.weight is no target"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "has layer_replication"),
        ({"modules_to_save": ["proj_out_1"]}, "has modules_to_save"),
        ({"trainable_token_indices": [1]}, "has trainable_token_indices"),
        ({"alora_invocation_tokens": [1]}, "has alora_invocation_tokens"),
        ({"kasa_config": {"beta": 1.0}}, "has kasa_config"),
        ({"an_option_of_tomorrow": 1}, "has an_option_of_tomorrow"),
        ({"alpha_pattern": {"(": 1}}, "configuration"),
        ({"alpha_pattern": {"to_q": "much"}}, "configuration"),
        ({"r": "four"}, "configuration"),
        ({"lora_alpha": float("nan")}, "configuration"),
        ({"lora_alpha": 10**400}, "configuration"),
    ],
)
def test_a_configuration_of_more_than_a_lora_is_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = styles.peft(styles.adapted(TINY, ".*to_q"), tmp_path)
    styles.change_config(file, **values)
    with pytest.raises(CheckpointError, match=message) as error:
        adopted(TINY, tmp_path, file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("text", ["", "[1]", "\ufeff{}", "{", '"text"', "[" * 100_000, '{"a":' * 100_000])
def test_a_configuration_that_cannot_be_read_is_named(text: str, tmp_path: Path) -> None:
    file = styles.peft(styles.adapted(TINY, ".*to_q"), tmp_path)
    (tmp_path / "peft/adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match="configuration"):
        adopted(TINY, tmp_path, file)


@pytest.mark.parametrize("option", [{"bias": "all"}, {"modules_to_save": ["proj_out_1"]}])
def test_what_peft_trains_besides_is_refused(option: dict[str, Any], tmp_path: Path) -> None:
    file = styles.peft(styles.adapted(TINY, ".*to_q", **option), tmp_path)
    with pytest.raises(CheckpointError, match=r"\.bias is no factor|modules_to_save"):
        adopted(TINY, tmp_path, file)


@pytest.mark.parametrize(
    "neighbor", [CONFIG | {"lora_alpha": 64}, CONFIG | {"use_dora": True}, {"peft_type": "LOHA"}, 1]
)
@pytest.mark.parametrize("alpha", [1.0, None])
def test_a_configuration_of_another_file_is_not_read(neighbor: Any, alpha: float | None, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(neighbor, default=list))
    save_file(factors() | ({} if alpha is None else named("alpha", torch.tensor(alpha))), tmp_path / "lora.safetensors")
    found = adopted(TINY, tmp_path, tmp_path / "lora.safetensors")
    change = found.get_submodule(NAME).weight - random_backbone(TINY).get_submodule(NAME).weight
    torch.testing.assert_close(change, torch.full((48, 48), 2.0 * (alpha or 2.0) / 2), atol=1e-6, rtol=1e-5)


def test_one_that_says_alpha_again_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG, default=list))
    message = refusal(factors() | named("alpha", torch.tensor(1.0)), tmp_path, name="adapter_model.safetensors")
    assert f"{NAME}.alpha is a second alpha" in message


def test_pefts_file_without_its_configuration_is_refused(tmp_path: Path) -> None:
    """Its strength would be a guess."""
    prefixed = {f"base_model.model.{key}": tensor for key, tensor in factors().items()}
    assert "adapter_config.json" in refusal(prefixed, tmp_path)
    assert "adapter_config.json" in refusal(prefixed, tmp_path, name="adapter_model.safetensors")


def test_several_are_merged_in_any_order(tmp_path: Path) -> None:
    model: Any = styles.adapted(TINY, ".*to_q", alpha_pattern={r".*0\.attn1\.to_q": 3})
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=5, target_modules=["to_q", "to_k"], init_lora_weights=False))
    model.save_pretrained(str(tmp_path / "peft"))
    first = LoraFile(file=tmp_path / "peft/adapter_model.safetensors", scale=0.7)
    second = LoraFile(file=tmp_path / "peft/second/adapter_model.safetensors", scale=-1.5)
    save_static(random_backbone(TINY), tmp_path / "plain")
    found = []
    for number, loras in enumerate(((first, second), (second, first))):
        adopt_static(str(tmp_path / "plain"), TINY, tmp_path / str(number), loras)
        found.append(load_static(str(tmp_path / str(number)), TINY).state_dict())
    for name, scale in (("default", 0.7), ("second", -1.5)):
        for layer in model.modules():
            if hasattr(layer, "lora_A") and name in layer.lora_A:
                layer.scaling[name] *= scale
    truth = model.merge_and_unload(adapter_names=["default", "second"]).state_dict()
    torch.testing.assert_close(found[0], truth, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_also_where_one_is_a_dora(tmp_path: Path) -> None:
    """A DoRA rescales the original weights, not those that another LoRA has changed: as peft computes, unmerged."""
    model: Any = styles.adapted(TINY, ".*(to_q|net.0.proj)", use_dora=True)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    model.save_pretrained(str(tmp_path / "peft"))
    model.base_model.set_adapter(["default", "second"])
    files = (tmp_path / "peft/second/adapter_model.safetensors", tmp_path / "peft/adapter_model.safetensors")
    save_static(random_backbone(TINY), tmp_path / "plain")
    adopt_static(str(tmp_path / "plain"), TINY, tmp_path / "merged", [LoraFile(file=file) for file in files])
    inputs = NoisedInputs(preset=TINY, batch_size=2).at(0.4)
    truth = model.base_model.model(**inputs).sample
    found = load_static(str(tmp_path / "merged"), TINY)(**inputs).sample
    torch.testing.assert_close(found, truth, atol=1e-5, rtol=1e-5)
    assert (truth - random_backbone(TINY)(**inputs).sample).abs().max() > 1e-3


def test_a_scale_is_pefts(tmp_path: Path) -> None:
    """Of a DoRA, too, whose magnitude stays."""
    model: Any = styles.adapted(TINY, ".*to_q", use_dora=True)
    found = adopted(TINY, tmp_path, styles.peft(model, tmp_path), scale=0.3)
    for layer in model.modules():
        if hasattr(layer, "scale_layer"):
            layer.scale_layer(0.3)
    torch.testing.assert_close(found.state_dict(), model.merge_and_unload().state_dict(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_factors_may_be_of_any_floating_point_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({key: tensor.to(dtype) for key, tensor in factors().items()}, tmp_path / "lora.safetensors")
    found = adopted(TINY, tmp_path, tmp_path / "lora.safetensors")
    change = found.get_submodule(NAME).weight - random_backbone(TINY).get_submodule(NAME).weight
    torch.testing.assert_close(change, torch.full((48, 48), 2.0), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_keep_their_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    save_static(random_backbone(TINY).to(dtype), tmp_path / "source")
    save_file(factors(), tmp_path / "lora.safetensors")
    adopted(TINY, tmp_path, tmp_path / "lora.safetensors", source=tmp_path / "source")
    before, after = (StoredWeights(tmp_path / folder)[f"{NAME}.weight"] for folder in ("source", "merged"))
    assert after.dtype is dtype
    assert torch.equal(after, (before.double() + 2).to(dtype))


def test_a_result_beyond_the_dtype_is_blamed_on_the_lora(tmp_path: Path) -> None:
    save_static(random_backbone(TINY).half(), tmp_path / "source")
    for size in (9e4, 3e38):
        save_file(factors() | named("lora_B.weight", torch.full((48, 2), size)), tmp_path / "strong.safetensors")
        with pytest.raises(CheckpointError, match=rf"{NAME}.*strong\.safetensors|strong\.safetensors.*{NAME}"):
            adopted(TINY, tmp_path, tmp_path / "strong.safetensors", source=tmp_path / "source")


EMBEDDER = "transformer_blocks.{}.norm1.emb.timestep_embedder.linear_1"


def test_an_embedder_that_blocks_share_is_moved_in_all_of_them(tmp_path: Path) -> None:
    """diffusers' module has one for each block, and so has a LoRA that peft made of it."""
    shapes = {"lora_A": (2, 256), "lora_B": (48, 2)}
    parts = {f"{part}.weight": torch.randn(shape) / 10 for part, shape in shapes.items()}
    whole = {f"{EMBEDDER.format(block)}.{part}": tensor.clone() for block in range(2) for part, tensor in parts.items()}
    save_file(whole, tmp_path / "lora.safetensors")
    found = adopted(TINY, tmp_path, tmp_path / "lora.safetensors")
    change = parts["lora_B.weight"] @ parts["lora_A.weight"]
    for block in range(2):
        name = f"{EMBEDDER.format(block)}.weight"
        torch.testing.assert_close(found.state_dict()[name], random_backbone(TINY).state_dict()[name] + change)
    half = {key: tensor for key, tensor in whole.items() if key.startswith("transformer_blocks.0")}
    assert EMBEDDER.format(1) in refusal(half, tmp_path, name="half.safetensors")


def test_also_in_a_fine_tuned_checkpoint(tmp_path: Path) -> None:
    """Where blocks share one module, each is changed once."""
    model = random_dynamic(TINY)
    rank_units(model, NoisedInputs(preset=TINY, batch_size=2), [0.3, 0.8])
    save_dynamic(model, tmp_path / "dynamic", TINY)
    for block in range(2):
        lora = factors(EMBEDDER.format(block)) | named("lora_A.weight", torch.ones(2, 256), EMBEDDER.format(block))
        save_file(lora | (load_file(tmp_path / "lora.safetensors") if block else {}), tmp_path / "lora.safetensors")
    found = adopted(TINY, tmp_path, tmp_path / "lora.safetensors", source=tmp_path / "dynamic")
    name = f"{EMBEDDER.format(1)}.weight"
    torch.testing.assert_close(found.state_dict()[name], model.backbone.state_dict()[name] + 2)


def test_every_linear_of_flux_can_have_one(tmp_path: Path) -> None:
    """Under peft's own names, as README has it."""
    model = styles.adapted(FLUX, "all-linear")
    names = {name for name, module in random_backbone(FLUX).named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(styles.layers_of(model)) == names
    found = adopted(FLUX, tmp_path, styles.peft(model, tmp_path))
    assert_same(found, styles.merged(model), random_backbone(FLUX))


def test_so_can_the_table_of_labels(tmp_path: Path) -> None:
    table = "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table"
    parts = {"lora_embedding_A": torch.randn(2, 11) / 10, "lora_embedding_B": torch.randn(48, 2) / 10}
    whole = {f"{table.format(block)}.{part}": tensor.clone() for block in range(2) for part, tensor in parts.items()}
    save_file(whole, tmp_path / "lora.safetensors")
    found = adopted(TINY, tmp_path, tmp_path / "lora.safetensors")
    embedding = random_backbone(TINY).get_submodule(table.format(0))
    model: Any = get_peft_model(torch.nn.Sequential(embedding), LoraConfig(r=2, lora_alpha=2, target_modules=["0"]))
    adapter = {f"base_model.model.0.{part}.default": tensor for part, tensor in parts.items()}
    model.load_state_dict(adapter, strict=False)
    expected = model.merge_and_unload()[0].weight
    assert not torch.equal(expected, random_backbone(TINY).get_submodule(table.format(0)).weight)
    torch.testing.assert_close(found.get_submodule(table.format(1)).weight, expected, atol=1e-6, rtol=1e-6)


def test_so_can_convolutions(tmp_path: Path) -> None:
    model: Any = styles.adapted(TINY, r"pos_embed\.proj|proj_out_1")
    found = adopted(TINY, tmp_path, styles.peft(model, tmp_path))
    torch.testing.assert_close(found.state_dict(), styles.merged(model).state_dict(), atol=1e-6, rtol=1e-6)
    change = found.pos_embed.proj.weight - random_backbone(TINY).get_submodule("pos_embed.proj").weight
    assert change.abs().max() > 1e-3


def test_what_is_no_file_of_safetensors_is_named(tmp_path: Path) -> None:
    (tmp_path / "lora.bin").touch()
    (tmp_path / "damaged.safetensors").write_bytes(b"12345678")
    for name, message in (("lora.bin", "is not a file of safetensors"), ("damaged.safetensors", "is damaged")):
        with pytest.raises(CheckpointError, match=rf"{name} {message}"):
            adopted(TINY, tmp_path, tmp_path / name)


def test_an_alpha_beside_the_factors_counts(tmp_path: Path) -> None:
    save_file(factors() | named("alpha", torch.tensor(1.0)), tmp_path / "lora.safetensors")
    found = adopted(TINY, tmp_path, tmp_path / "lora.safetensors")
    change = found.get_submodule(NAME).weight - random_backbone(TINY).get_submodule(NAME).weight
    torch.testing.assert_close(change, torch.full((48, 48), 2 * 1.0 / 2), atol=1e-6, rtol=1e-5)


class Counted(Mapping[str, torch.Tensor]):
    """Tensors of 4 KiB that are made when asked for; keeps the most that were alive at once."""

    def __init__(self, length: int) -> None:
        self.length, self.most = length, 0
        self._alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = torch.full((1024,), float(name))
        self._alive.add(tensor)
        self.most = max(self.most, len(self._alive))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return map(str, range(self.length))

    def __len__(self) -> int:
        return self.length


def test_a_model_is_never_whole_in_memory(tmp_path: Path) -> None:
    weights = Counted(40)
    write_shards(weights, tmp_path, shard_bytes=12 << 10)
    assert weights.most <= 4
    stored = StoredWeights(tmp_path)
    assert set(stored) == set(weights)
    assert all(float(stored[name][0]) == float(name) for name in stored)
    (tmp_path / "linked").mkdir()
    link_weights(tmp_path, tmp_path / "linked")
    assert set(StoredWeights(tmp_path / "linked")) == set(weights)
    (tmp_path / "small").mkdir()
    write_shards(Counted(2), tmp_path / "small")
    assert [path.name for path in (tmp_path / "small").iterdir()] == [WEIGHTS]
