"""Checkpoints that are absurd: refused at once, in one sentence that names the file and the value."""

from __future__ import annotations

import inspect
import json
import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, LatteTransformer3DModel
from safetensors.torch import load_file, save_file

from dyexport.checkpoints.dialects import has_routers
from dyexport.checkpoints.dynamic import load_dynamic, save_dynamic
from dyexport.checkpoints.locate import find_checkpoint
from dyexport.checkpoints.static import WEIGHTS, load_static, save_static
from dyexport.checkpoints.structure import read_config
from dyexport.errors import CheckpointError
from dyexport.models.random_weights import random_backbone
from dyexport.presets import PRESETS, get_preset
from tests.checkpoints.published_dit import random_state
from tests.factories import tiny_model, tiny_preset

TINY = tiny_preset()


@pytest.fixture
def static(tmp_path: Path) -> Path:
    save_static(random_backbone(TINY), tmp_path / "static")
    return tmp_path / "static"


def with_config(directory: Path, **entries: Any) -> Path:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **entries}))
    return directory


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("norm_eps", float("nan")),
        ("norm_eps", float("inf")),
        ("norm_eps", None),
        ("norm_eps", "1e-6"),
        ("norm_eps", -1e-6),
        ("norm_eps", 1e300),
        ("norm_eps", [1e-6]),
        ("freq_shift", "0"),
        ("freq_shift", float("nan")),
        ("freq_shift", 128),
        ("freq_shift", None),
        ("stored_positions", "yes"),
        ("stored_positions", 2),
        ("num_layers", 10**400),
        ("num_layers", None),
        ("activation_fn", "relu"),
        ("norm_type", None),
        ("sample_size", "x" * 10**6),
        ("attention_bias", False),
    ],
)
def test_a_value_that_no_model_has_is_named(static: Path, name: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: {name} is ") as caught:
        load_static(str(with_config(static, **{name: value})), TINY)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "[[1, 2]]",
        "null",
        "7",
        '"text"',
        "{",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"num_layers": ' + "9" * 5000 + "}",
    ],
    ids=lambda content: content[:12],
)
def test_a_config_that_is_none_is_named(static: Path, content: str) -> None:
    (static / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        load_static(str(static), TINY)
    assert len(str(caught.value)) < 600


def test_a_byte_order_mark_is_no_damage(static: Path) -> None:
    text = (static / "config.json").read_text(encoding="utf-8")
    (static / "config.json").write_text(text, encoding="utf-8-sig")
    load_static(str(static), TINY)


VALUES = (
    None, True, False, 0, -1, 1, 2**63, 10**400, 1e300, -0.0, float("nan"), float("inf"), "", "0", "gelu", [], [1], {},
    {"a": {"b": []}}, [[[]]],
)  # fmt: skip
STOCK = {"dit-s-2": DiTTransformer2DModel, "flux": FluxTransformer2DModel, "latte": LatteTransformer3DModel}


@pytest.mark.parametrize("model", STOCK)
def test_any_config_is_read_or_refused_by_name(model: str, tmp_path: Path) -> None:
    preset, chance = get_preset(model), random.Random(0)
    names = [
        *inspect.signature(STOCK[model]).parameters,
        "freq_shift",
        "stored_positions",
        "norm_eps",
        "_class_name",
        "x",
    ]
    refused = 0
    for _ in range(500):
        config: dict[str, Any] = dict(preset.transformer_config())
        for name in chance.sample(names, 2):
            config[name] = chance.choice(VALUES)
        (tmp_path / "config.json").write_text(json.dumps(config))
        try:
            found = read_config(tmp_path, preset)
        except CheckpointError as error:
            refused += "config.json" in str(error)
        else:
            assert {name: found[name] for name in preset.transformer_config() if name != "norm_eps"} == {
                name: value for name, value in preset.transformer_config().items() if name != "norm_eps"
            }
            with torch.device("meta"):
                STOCK[model](**{k: v for k, v in found.items() if k in inspect.signature(STOCK[model]).parameters})
    assert refused > 100


def test_what_a_config_does_not_tell_is_what_diffusers_takes(static: Path) -> None:
    config = json.loads((static / "config.json").read_text())
    del config["norm_eps"], config["activation_fn"], config["norm_type"]
    (static / "config.json").write_text(json.dumps(config))
    stock = DiTTransformer2DModel.from_pretrained(static)
    assert stock.config.norm_eps != TINY.transformer_config()["norm_eps"]
    assert load_static(str(static), TINY).config.norm_eps == stock.config.norm_eps


@pytest.mark.parametrize("name", ["num_layers", "num_attention_heads", "sample_size"])
def test_a_size_that_is_not_told_is_diffusers_own(static: Path, name: str) -> None:
    config = json.loads((static / "config.json").read_text())
    del config[name]
    (static / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"{name} is \d+ where it is not given, dit-tiny has \d"):
        load_static(str(static), TINY)


def test_guidance_that_flux_does_not_tell_is_off(tmp_path: Path) -> None:
    config = dict(get_preset("flux").transformer_config())
    del config["guidance_embeds"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="guidance_embeds is False where it is not given, flux has True"):
        read_config(tmp_path, get_preset("flux"))
    del config["axes_dims_rope"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    read_config(tmp_path, get_preset("flux-schnell"))


def test_outputs_that_are_not_told_are_as_many_as_inputs(tmp_path: Path) -> None:
    preset = PRESETS["sit-digits"]
    for entries in ({"out_channels": None}, {}):
        config = {k: v for k, v in preset.transformer_config().items() if k != "out_channels"}
        (tmp_path / "config.json").write_text(json.dumps({**config, **entries}))
        assert read_config(tmp_path, preset)["out_channels"] == preset.in_channels


def changed(directory: Path, name: str, tensor: torch.Tensor) -> Path:
    save_file({**load_file(directory / WEIGHTS), name: tensor}, directory / WEIGHTS)
    return directory


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.full((8,), 1e300, dtype=torch.float64), "holds values beyond fp32"),
        (torch.full((8,), torch.inf), "holds NaN or infinity"),
        (torch.zeros(8, dtype=torch.int64), r"is stored as torch\.int64"),
        (torch.zeros(8, dtype=torch.int8), r"is stored as torch\.int8"),
        (torch.zeros(()), r"has shape \(\)"),
        (torch.zeros(0), r"has shape \(0,\)"),
    ],
)
def test_a_tensor_that_no_model_has_is_named(static: Path, tensor: torch.Tensor, message: str) -> None:
    name = "proj_out_2.bias"
    size = len(load_file(static / WEIGHTS)[name])
    tensor = tensor.repeat(size // 8 + 1)[:size].clone() if tensor.ndim and len(tensor) else tensor
    with pytest.raises(CheckpointError, match=rf"proj_out_2\.bias {message}"):
        load_static(str(changed(static, name, tensor)), TINY)


def test_meta_tensors_are_named(tmp_path: Path) -> None:
    state = {name: tensor.to("meta") for name, tensor in random_backbone(TINY).state_dict().items()}
    torch.save(state, tmp_path / "meta.pt")
    with pytest.raises(CheckpointError, match=r"meta\.pt: \S+ is a meta tensor, without values"):
        load_static(str(tmp_path / "meta.pt"), TINY)


def test_a_damaged_header_is_an_error_of_the_checkpoint(static: Path) -> None:
    file = static / WEIGHTS
    whole, chance = file.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for _ in range(60):
        content = bytearray(whole)
        content[chance.randrange(header)] = chance.randrange(256)
        file.write_bytes(content)
        try:
            load_static(str(static), TINY)
        except CheckpointError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize("source", ["x" * 5000, "/" + "y" * 300, "a\0b", "/dev/null", "", "."])
def test_names_that_are_no_checkpoint(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError):
        load_static(source, TINY)


PREFIXES = ("module.", "model.", "model.diffusion_model.", "module.model.", "_orig_mod.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_that_all_names_share_is_understood(static: Path, tmp_path: Path, prefix: str) -> None:
    expected = load_static(str(static), TINY).state_dict()
    weights = {f"{prefix}{name}": tensor for name, tensor in load_file(static / WEIGHTS).items()}
    torch.save({"model": weights}, tmp_path / "trained.pt")
    save_file(weights, static / WEIGHTS)
    for source in (static, static / WEIGHTS, tmp_path / "trained.pt"):
        found = load_static(str(source), TINY).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_prefix_of_published_names_is_understood(tmp_path: Path) -> None:
    state = random_state(TINY, routers=True)
    save_file(state, tmp_path / "bare.safetensors")
    save_file({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "ddp.safetensors")
    assert has_routers(tmp_path / "ddp.safetensors")
    expected = load_static(str(tmp_path / "bare.safetensors"), TINY).state_dict()
    found = load_static(str(tmp_path / "ddp.safetensors"), TINY).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_prefix_that_only_some_names_have_is_not(static: Path) -> None:
    weights = load_file(static / WEIGHTS)
    save_file({**weights, "module.proj_out_2.bias": weights["proj_out_2.bias"].clone()}, static / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"holds module\.proj_out_2\.bias"):
        load_static(str(static), TINY)


@pytest.mark.parametrize("index", ["diffusion_pytorch_model.safetensors.index.fp16.json"])
@pytest.mark.parametrize("shard", ["diffusion_pytorch_model.fp16-0000{}-of-00002.safetensors"])
def test_the_shards_of_a_variant_are_read(static: Path, index: str, shard: str) -> None:
    DiTTransformer2DModel.from_pretrained(static).half().save_pretrained(
        static, variant="fp16", max_shard_size="20KB", safe_serialization=True
    )
    expected = load_file(static / WEIGHTS)
    (static / WEIGHTS).unlink()
    assert (static / index).is_file()
    found = load_static(str(static), TINY).state_dict()
    assert all(torch.equal(found[name], tensor.half().float()) for name, tensor in expected.items() if name in found)


@pytest.mark.parametrize("model", ["flux-tiny", "latte-tiny"])
def test_published_names_of_another_architecture_are_one_sentence(model: str, tmp_path: Path) -> None:
    save_file(random_state(TINY, routers=False), tmp_path / "published.safetensors")
    with pytest.raises(CheckpointError, match=f"published DiT and SiT code, and {model} takes a diffusers directory"):
        load_static(str(tmp_path / "published.safetensors"), get_preset(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 0}, "heads: Input should be greater than 0"),
        ({"heads": 3}, "has 3 heads"),
        ({"groups": 10**9}, "1000000000 groups"),
        ({"tokens": "maybe"}, "tokens"),
        ({"preset": "nowhere", "model": None}, "unknown model"),
        ({"model": {"stock": "UNet2DModel"}}, "_class_name is 'UNet2DModel'"),
        ({"model": {"stock": "DiTTransformer2DModel", "layers": "many"}}, "layers: Input should be a valid integer"),
    ],
)
def test_what_a_dynamic_checkpoint_says_of_itself_is_checked(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    save_dynamic(tiny_model(), tmp_path, TINY)
    spec = json.loads((tmp_path / "dynamic.json").read_text())
    (tmp_path / "dynamic.json").write_text(json.dumps({**spec, **change}))
    with pytest.raises(CheckpointError, match=message):
        load_dynamic(tmp_path)
    for content in (b"\xff", b"[" * 100_000, b""):
        (tmp_path / "dynamic.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"dynamic\.json"):
            load_dynamic(tmp_path)


@pytest.mark.parametrize("order", [torch.zeros(3, 4, dtype=torch.int64), torch.arange(4), torch.rand(3, 4)])
def test_an_order_of_units_that_is_none_is_named(tmp_path: Path, order: torch.Tensor) -> None:
    save_dynamic(tiny_model(), tmp_path, TINY)
    save_file({"heads": order, "groups": order.clone()}, tmp_path / "order.safetensors")
    with pytest.raises(CheckpointError, match=r"order\.safetensors: heads are no order of units"):
        load_dynamic(tmp_path)


@contextmanager
def nobody() -> Iterator[None]:
    """Inside, the test may not read what it may not; root may read everything."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "."])
def test_what_may_not_be_read_is_not_called_missing_or_damaged(name: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        save_static(random_backbone(TINY), Path(place))
        for path in (Path(place), *Path(place).iterdir()):
            path.chmod(0o755)
        (Path(place) / name).chmod(0)
        with nobody(), pytest.raises(CheckpointError, match=r"cannot read .*Permission denied"):
            load_static(place, TINY)
        Path(place).chmod(0o755)


def test_a_file_is_found_before_a_hub(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").touch()
    assert find_checkpoint(str(tmp_path / "a.safetensors")) == tmp_path / "a.safetensors"
