"""Published files: what is loaded computes what the published code computes, and what does not fit is named."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dyexport.backbones.base import Preset
from dyexport.checkpoints.dialects import has_routers
from dyexport.checkpoints.dynamic import load_dynamic, load_with_routers, open_widths, save_dynamic
from dyexport.checkpoints.static import load_static, save_static
from dyexport.errors import CheckpointError
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.inputs import NoisedInputs
from dyexport.models.random_weights import random_dynamic
from dyexport.presets import get_preset
from dyexport.runtime.loading import load
from tests.checkpoints.published_dit import State, denoise, random_state
from tests.factories import random_timesteps, tiny_preset
from tests.pipeline.tiny import build, tiny_settings

ATOL = 2e-5


def inputs_at(preset: Preset, t: float) -> dict[str, Tensor]:
    return dict(NoisedInputs(preset=preset, batch_size=2).at(t))


@pytest.fixture(params=["dit", "sit"])
def preset(request: pytest.FixtureRequest) -> Preset:
    return tiny_preset(request.param)


def saved(state: object, folder: Path, name: str = "published.pt") -> Path:
    torch.save(state, folder / name)
    return folder / name


@torch.no_grad()
def test_a_static_file_computes_what_the_published_code_does(preset: Preset, tmp_path: Path) -> None:
    state = random_state(preset, routers=False)
    save_static(load_static(str(saved(state, tmp_path)), preset), tmp_path / "copy")
    for model in (load_static(str(tmp_path / "published.pt"), preset), load_static(str(tmp_path / "copy"), preset)):
        for t in random_timesteps(preset, 8):
            arguments = inputs_at(preset, t)
            truth = denoise(state, preset, **arguments, routed=False)
            torch.testing.assert_close(model(**arguments).sample, truth, atol=ATOL, rtol=0)


@torch.no_grad()
def test_a_dydit_file_brings_its_routers(preset: Preset, tmp_path: Path) -> None:
    state = random_state(preset, routers=True)
    given = load_with_routers(saved(state, tmp_path), preset)
    save_dynamic(given, tmp_path / "copy", preset)
    kept = []
    for model in (given, load_dynamic(tmp_path / "copy")[0], load_with_routers(tmp_path / "copy", preset)):
        for t in random_timesteps(preset, 8):
            arguments = inputs_at(preset, t)
            output = model(arguments)
            truth = denoise(state, preset, **arguments, routed=True)
            torch.testing.assert_close(output.sample, truth, atol=ATOL, rtol=0)
            kept.append(output.heads.mean())
    assert torch.stack(kept).std() > 0, "the routers do nothing"
    static = load_static(str(tmp_path / "published.pt"), preset)
    arguments = inputs_at(preset, 0.5)
    truth = denoise(state, preset, **arguments, routed=False)
    torch.testing.assert_close(static(**arguments).sample, truth, atol=ATOL, rtol=0)


@torch.no_grad()
def test_a_bundle_of_a_dydit_file_computes_what_the_published_code_does(preset: Preset, tmp_path: Path) -> None:
    state = random_state(preset, routers=True)
    given = {"budget": None, "random_weights": False, "checkpoint": str(saved({"ema": state}, tmp_path)), "engines": 2}
    settings = replace(tiny_settings(tmp_path, **given), model=preset)
    build(settings)
    bundle = load(settings.out)
    for t in random_timesteps(preset, 8):
        arguments = inputs_at(preset, t)
        truth = denoise(state, preset, **arguments, routed=True)
        torch.testing.assert_close(bundle(**arguments).sample, truth, atol=ATOL, rtol=0)


def test_the_averaged_weights_of_a_training_file_are_taken(tmp_path: Path) -> None:
    preset = tiny_preset()
    state, other = random_state(preset, routers=False, seed=1), random_state(preset, routers=False, seed=2)
    records = {"opt": {"step": 3}, "args": Namespace(lr=1e-4)}
    wanted = load_static(str(saved(state, tmp_path, "bare.pth")), preset).state_dict()
    files = [
        saved({"model": other, "ema": state, **records}, tmp_path, "training.pt"),
        saved({"model": state, **records}, tmp_path, "model.pt"),
    ]
    save_file(state, tmp_path / "published.safetensors")
    torch.save(state, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for file in (*files, tmp_path / "published.safetensors", tmp_path / "legacy.pt"):
        found = load_static(str(file), preset).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items()), file


def test_only_files_with_routers_are_taken_as_they_are(tmp_path: Path) -> None:
    preset = tiny_preset()
    for routers in (True, False):
        state = random_state(preset, routers=routers)
        save_file(state, tmp_path / "published.safetensors")
        assert has_routers(tmp_path / "published.safetensors") is routers
        assert has_routers(saved({"ema": state, "opt": {}}, tmp_path)) is routers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_run_in_full_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    preset = tiny_preset()
    state = {name: tensor.to(dtype) for name, tensor in random_state(preset, routers=False).items()}
    model = load_static(str(saved(state, tmp_path)), preset)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert torch.equal(model.state_dict()["proj_out_2.weight"], state["final_layer.linear.weight"].float())


def broken(state: State, change: str) -> State:
    match change:
        case "missing":
            del state["blocks.1.attn.qkv.bias"]
        case "one router missing":
            del state["blocks.2.mlp_rate.router.weight"]
        case "unknown":
            state["temp_embed"] = torch.zeros(1)
        case "wider":
            state["blocks.0.attn.qkv.weight"] = torch.zeros(97, 32)
        case "other heads":
            state["blocks.0.attn_rate.router.weight"] = torch.zeros(7, 32)
        case "other resolution":
            state["pos_embed"] = torch.zeros(1, 64, 32)
        case "nan":
            state["blocks.2.token_selection.mlp_head.0.weight"][0, 0] = torch.nan
        case "integers":
            state["final_layer.linear.bias"] = state["final_layer.linear.bias"].to(torch.int8)
        case "sparse":
            state["final_layer.linear.bias"] = state["final_layer.linear.bias"].to_sparse()
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"lacks blocks\.1\.attn\.qkv\.bias;"),
        ("one router missing", r"lacks blocks\.2\.mlp_rate\.router\.weight;"),
        ("unknown", r"holds temp_embed, which dit-tiny does not have"),
        ("wider", r"blocks\.0\.attn\.qkv\.weight has shape \(97, 32\), dit-tiny needs \(96, 32\)"),
        ("other heads", r"blocks\.0\.attn_rate\.router\.weight has shape \(7, 32\), dit-tiny needs \(3, 32\)"),
        ("other resolution", r"pos_embed has shape \(1, 64, 32\), dit-tiny needs \(1, 16, 32\)"),
        ("nan", r"blocks\.2\.token_selection\.mlp_head\.0\.weight holds NaN"),
        ("integers", r"final_layer\.linear\.bias is stored as torch\.int8"),
        ("sparse", r"final_layer\.linear\.bias is not a dense tensor"),
    ],
)
def test_what_does_not_fit_is_named_as_in_the_file(change: str, message: str, tmp_path: Path) -> None:
    file = saved(broken(random_state(tiny_preset(), routers=True), change), tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_with_routers(file, tiny_preset())


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("take", [lambda file: has_routers(file), lambda file: load_static(str(file), tiny_preset())])
def test_code_in_a_file_is_never_run(take: object, zipped: bool, tmp_path: Path) -> None:
    assert callable(take)
    state = random_state(tiny_preset(), routers=True)
    content = {"ema": state, "args": Hostile(tmp_path / "ran")}
    torch.save(content, tmp_path / "hostile.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"hostile\.pt is damaged or holds code, which is never run"):
        take(tmp_path / "hostile.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", [{}, {"ema": {}}, [1, 2], {"ema": {"blocks": 3}}, torch.zeros(2), {1: torch.zeros(1)}]
)
def test_files_without_weights_are_refused(content: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no weights|is not a dense tensor"):
        load_static(str(saved(content, tmp_path)), tiny_preset())


@pytest.mark.parametrize("name", ["weights.txt", "garbage.pt", "garbage.safetensors"])
def test_files_of_another_kind_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"is of no known kind|is damaged"):
        load_static(str(tmp_path / name), tiny_preset())


def dyflux_state() -> tuple[DynamicTransformer, State]:
    """A model of two double and three single blocks, and its file as DyFLUX would write it."""
    model = random_dynamic(get_preset("flux-tiny"), token_router="published")
    state = dict(model.backbone.state_dict())
    for name, tensor in model.routers.state_dict().items():
        block, kind, rest = name.split(".", maxsplit=2)
        if kind == "tokens":
            home = f"transformer_blocks.{block}" if int(block) < 2 else f"single_transformer_blocks.{int(block) - 2}"
            state[f"{home}.token_selection.{rest}"] = tensor
    return model, state


@torch.no_grad()
def test_a_dyflux_file_brings_its_token_routers(tmp_path: Path) -> None:
    preset = get_preset("flux-tiny")
    model, state = dyflux_state()
    open_widths(model, preset)
    given = load_with_routers(saved({"module": state, "step": 1}, tmp_path), preset)
    inputs = NoisedInputs(preset=preset, batch_size=2).at(0.5)
    wanted, found = model(inputs), given(inputs)
    assert torch.equal(found.sample, wanted.sample)
    assert torch.equal(found.tokens, wanted.tokens)
    assert not found.tokens.all()
    assert found.heads.all()
    assert found.groups.all()
    static = load_static(str(tmp_path / "published.pt"), preset)
    assert torch.equal(static(**inputs).sample, model.forward_dense(inputs))


def test_an_incomplete_dyflux_file_is_named(tmp_path: Path) -> None:
    _, state = dyflux_state()
    del state["single_transformer_blocks.1.token_selection.router.weight"]
    with pytest.raises(CheckpointError, match=r"lacks single_transformer_blocks\.1\.token_selection\.router\.weight"):
        load_with_routers(saved({"module": state}, tmp_path), get_preset("flux-tiny"))
