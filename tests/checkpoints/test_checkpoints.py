"""Checkpoints: round trips, and every way in which one can be wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from dyexport.bundle.spec import TokenRouterKind
from dyexport.checkpoints.dynamic import load_dynamic, save_dynamic
from dyexport.checkpoints.locate import find_local
from dyexport.checkpoints.static import WEIGHTS, load_static, save_static
from dyexport.errors import CheckpointError
from dyexport.models.inputs import NoisedInputs
from dyexport.models.random_weights import random_backbone, random_dynamic
from tests.factories import tiny_model, tiny_preset

ARGUMENTS = NoisedInputs(preset=tiny_preset(), batch_size=2).at(10.0)


@pytest.fixture
def static(tmp_path: Path) -> Path:
    save_static(random_backbone(tiny_preset()), tmp_path / "static")
    return tmp_path / "static"


@torch.no_grad()
def test_static_round_trip_and_diffusers_reads_it(static: Path) -> None:
    expected = random_backbone(tiny_preset())(**ARGUMENTS).sample
    assert torch.equal(load_static(str(static), tiny_preset())(**ARGUMENTS).sample, expected)
    stock = DiTTransformer2DModel.from_pretrained(static)
    assert torch.equal(stock(**ARGUMENTS).sample, expected)


@torch.no_grad()
def test_what_diffusers_saves_is_read(tmp_path: Path) -> None:
    stock = random_backbone(tiny_preset())
    fresh = DiTTransformer2DModel.from_config(stock.config)
    fresh.load_state_dict(stock.state_dict())
    fresh.save_pretrained(tmp_path / "pipe" / "transformer")
    loaded = load_static(str(tmp_path / "pipe"), tiny_preset())
    assert torch.equal(loaded(**ARGUMENTS).sample, stock(**ARGUMENTS).sample)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [True, False])
def test_dynamic_round_trip(tmp_path: Path, tokens: bool) -> None:
    model = tiny_model(tokens=tokens)
    save_dynamic(model, tmp_path, tiny_preset())
    loaded, preset = load_dynamic(tmp_path)
    assert preset == tiny_preset()
    assert loaded.has_token_routers is tokens
    for one, other in zip(loaded(ARGUMENTS), model(ARGUMENTS), strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["published", "compact"])
def test_the_kind_of_token_routers_is_recorded(tmp_path: Path, kind: TokenRouterKind) -> None:
    preset = tiny_preset("flux")
    inputs = NoisedInputs(preset=preset, batch_size=1).at(0.5)
    model = random_dynamic(preset, token_router=kind)
    save_dynamic(model, tmp_path, preset)
    loaded, _ = load_dynamic(tmp_path)
    assert loaded.token_router == kind
    assert torch.equal(loaded(inputs).tokens, model(inputs).tokens)


def test_a_checkpoint_that_records_no_kind_has_published_token_routers(tmp_path: Path) -> None:
    preset = tiny_preset("flux")
    save_dynamic(random_dynamic(preset, token_router="published"), tmp_path, preset)
    record = json.loads((tmp_path / "dynamic.json").read_text())
    del record["token_router"]
    (tmp_path / "dynamic.json").write_text(json.dumps(record))
    assert load_dynamic(tmp_path)[0].token_router == "published"


def test_token_routers_that_a_backbone_does_not_have_are_refused(tmp_path: Path) -> None:
    save_dynamic(tiny_model(), tmp_path, tiny_preset())
    record = json.loads((tmp_path / "dynamic.json").read_text())
    assert "token_router" not in record, "DiT has one kind, and older versions read the file"
    (tmp_path / "dynamic.json").write_text(json.dumps({**record, "token_router": "compact"}))
    with pytest.raises(CheckpointError, match="has compact token routers; dit-tiny has published ones"):
        load_dynamic(tmp_path)


def test_another_size_is_named(static: Path, tmp_path: Path) -> None:
    wider = replace(tiny_preset(), hidden_size=64, name="dit-wide")
    with pytest.raises(CheckpointError, match=r"config\.json: attention_head_dim is 8, dit-wide has 16"):
        load_static(str(static), wider)
    (static / WEIGHTS).rename(tmp_path / WEIGHTS)  # a folder without a configuration
    with pytest.raises(
        CheckpointError, match=r"pos_embed\.proj\.weight has shape \(32, 2, 2, 2\), dit-wide needs \(64"
    ):
        load_static(str(tmp_path / WEIGHTS), wider)


def test_missing_and_unknown_keys_are_named(static: Path) -> None:
    weights = load_file(static / WEIGHTS)
    moved = weights.pop("proj_out_2.bias")
    save_file(weights, static / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"lacks proj_out_2\.bias"):
        load_static(str(static), tiny_preset())
    save_file({**weights, "proj_out_2.bias": moved, "extra": moved.clone()}, static / WEIGHTS)
    with pytest.raises(CheckpointError, match="holds extra, which dit-tiny does not have"):
        load_static(str(static), tiny_preset())


def test_nan_weights_are_refused(static: Path) -> None:
    weights = load_file(static / WEIGHTS)
    weights["proj_out_1.weight"][3, 5] = torch.nan
    save_file(weights, static / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"proj_out_1\.weight holds NaN"):
        load_static(str(static), tiny_preset())


def test_drifted_copies_are_refused(static: Path) -> None:
    weights = load_file(static / WEIGHTS)
    weights["transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"][0] += 1
    save_file(weights, static / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"transformer_blocks\.2\.norm1\.emb.*differs"):
        load_static(str(static), tiny_preset())


def test_truncated_file_is_named(static: Path) -> None:
    (static / WEIGHTS).write_bytes((static / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_static(str(static), tiny_preset())


def test_code_in_a_pickle_is_never_run(static: Path, tmp_path: Path) -> None:
    (static / WEIGHTS).unlink()
    torch.save({"proj_out_2.bias": Hostile(str(tmp_path / "ran"))}, static / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds code, which is never run"):
        load_static(str(static), tiny_preset())
    assert not (tmp_path / "ran").exists()


class Hostile:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (Path(self.target).touch, ())


def test_paths_that_do_not_exist_and_hubs_out_of_reach(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_static(str(tmp_path / "nowhere"), tiny_preset())
    with pytest.raises(CheckpointError, match=r"--checkpoint .* or --random-weights"):
        load_static("facebook/DiT-XL-2-256", tiny_preset())


def test_norm_epsilon_of_the_checkpoint_is_kept(static: Path) -> None:
    config = json.loads((static / "config.json").read_text())
    (static / "config.json").write_text(json.dumps(config | {"norm_eps": 1e-5}))
    assert load_static(str(static), tiny_preset()).config.norm_eps == 1e-5


def test_another_resolution_of_the_same_shapes_is_named(static: Path) -> None:
    larger = replace(tiny_preset(), sample_size=16, name="dit-large")
    with pytest.raises(CheckpointError, match=r"sample_size is 8, dit-large has 16"):
        load_static(str(static), larger)


def test_a_file_of_a_directory_is_read_with_its_config(static: Path, tmp_path: Path) -> None:
    config = json.loads((static / "config.json").read_text())
    (static / "config.json").write_text(json.dumps(config | {"norm_eps": 1e-5, "freq_shift": 0}))
    configured = load_static(str(static / WEIGHTS), tiny_preset())
    assert (configured.config.norm_eps, configured.config.freq_shift) == (1e-5, 0)
    (static / WEIGHTS).rename(tmp_path / "alone.safetensors")
    alone = load_static(str(tmp_path / "alone.safetensors"), tiny_preset())
    assert alone.config.norm_eps == 1e-6
    embedders = [model.transformer_blocks[0].norm1.emb for model in (configured, alone)]
    assert [embedder.time_proj.downscale_freq_shift for embedder in embedders] == [0, 1]


def shard(directory: Path) -> Path:
    """Split the weights of a directory in two."""
    weights = load_file(directory / WEIGHTS)
    names = list(weights)
    halves = {f"diffusion_pytorch_model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for file, part in halves.items():
        save_file({name: weights[name] for name in part}, directory / file)
    (directory / WEIGHTS).unlink()
    index = directory / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in halves.items() for name in part}}))
    return index


def test_shards_are_read_as_their_index_says(static: Path) -> None:
    shard(static)
    save_file({"stray": torch.zeros(1)}, static / "diffusion_pytorch_model-00003-of-00003.safetensors")
    expected = random_backbone(tiny_preset()).state_dict()
    found = load_static(str(static), tiny_preset()).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_missing_shard_is_named(static: Path) -> None:
    shard(static)
    (static / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names diffusion_pytorch_model-00002-of-00002\.safetensors, not to be"):
        load_static(str(static), tiny_preset())


@pytest.mark.parametrize("content", ["[]", "{}", "not json", '{"weight_map": {"a": "../secret.safetensors"}}'])
def test_a_broken_index_is_refused(static: Path, content: str) -> None:
    shard(static).write_text(content)
    with pytest.raises(CheckpointError, match="is not an index of shards"):
        load_static(str(static), tiny_preset())


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("dynamic/config.json", "is the work directory of a build; give its checkpoint, .*/dynamic"),
        ("manifest.json", "is a bundle, which has engines and no checkpoint"),
    ],
)
def test_what_a_build_wrote_next_to_checkpoints_is_named(tmp_path: Path, file: str, message: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("{}")
    with pytest.raises(CheckpointError, match=message):
        find_local(str(tmp_path))


def test_of_several_variants_none_is_guessed(static: Path) -> None:
    half = {name: tensor.half() for name, tensor in load_file(static / WEIGHTS).items()}
    save_file(half, static / "diffusion_pytorch_model.fp16.safetensors")
    full = load_static(str(static), tiny_preset()).state_dict()["proj_out_2.weight"]
    (static / WEIGHTS).unlink()
    assert torch.equal(load_static(str(static), tiny_preset()).state_dict()["proj_out_2.weight"], full.half().float())
    save_file(half, static / "diffusion_pytorch_model.other.safetensors")
    with pytest.raises(CheckpointError, match="several variants"):
        load_static(str(static), tiny_preset())
    for file in static.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_static(str(static), tiny_preset())
