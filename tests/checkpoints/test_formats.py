"""Checkpoints in the formats of other software: Black Forest Labs, ComfyUI, fp8, GGUF, quantized directories."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file
from torch import Tensor

from dyexport.backbones.dialect import Part
from dyexport.backbones.dit.preset import DiTPreset
from dyexport.backbones.flux.preset import FluxPreset
from dyexport.backbones.flux.published import BlackForestLabs
from dyexport.checkpoints.static import load_static, meta_backbone, save_static
from dyexport.checkpoints.structure import resolve_preset
from dyexport.errors import CheckpointError
from dyexport.models.random_weights import random_backbone
from dyexport.presets import get_preset
from tests.checkpoints.published_dit import random_state

TINY = get_preset("flux-tiny")
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def stock() -> Weights:
    """Weights of a small FLUX by the names of diffusers."""
    return dict(random_backbone(TINY).state_dict())


def black_forest_labs(stock: Mapping[str, Tensor]) -> Weights:
    """The same by the names of Black Forest Labs: parts of a fused tensor put together."""
    pieces: dict[str, dict[int, Tensor]] = {}
    for name, parts in BlackForestLabs().places(stock, TINY).items():
        tensors = stock[name].chunk(len(parts))
        for part, tensor in zip(parts, tensors, strict=True):
            pieces.setdefault(part.name, {})[part.start] = tensor
    return {name: torch.cat([parts[start] for start in sorted(parts)]) for name, parts in pieces.items()}


def assert_loads(
    file: Path, stock: Mapping[str, Tensor], *, change: Callable[[str, Tensor], Tensor] | None = None
) -> None:
    loaded = load_static(str(file), TINY).state_dict()
    assert loaded.keys() == stock.keys()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, stock[name] if change is None else change(name, stock[name])), name


def test_rows_are_those_of_diffusers_converter() -> None:
    """At full width, which that converter takes for granted; a tensor is the numbers of its rows."""
    preset = FluxPreset(name="flux-2", double_blocks=2, single_blocks=2)
    target = meta_backbone(preset, preset.transformer_config()).state_dict()
    places = BlackForestLabs().places(target, preset)
    assert places.keys() == target.keys()
    lengths: dict[str, int] = {}
    for name, parts in places.items():
        for part in parts:
            lengths[part.name] = target[name].shape[0] // len(parts) // (part.stop - part.start) * part.of
    starts = dict(zip(lengths, torch.tensor([0, *lengths.values()]).cumsum(0).tolist(), strict=False))
    rows = {name: torch.arange(start, start + lengths[name]) for name, start in starts.items()}

    def ours(part: Part) -> Tensor:
        unit = lengths[part.name] // part.of
        return rows[part.name][part.start * unit : part.stop * unit]

    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(rows))
    assert theirs.keys() == places.keys()
    for name, parts in places.items():
        assert torch.equal(torch.cat([ours(part) for part in parts]), theirs[name]), name


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "module."])
def test_a_single_file_of_black_forest_labs(stock: Weights, tmp_path: Path, prefix: str) -> None:
    save_file(
        {f"{prefix}{name}": tensor for name, tensor in black_forest_labs(stock).items()}, tmp_path / "a.safetensors"
    )
    assert_loads(tmp_path / "a.safetensors", stock)


def test_its_structure_is_read_off_shapes() -> None:
    preset = FluxPreset(name="x", double_blocks=3, single_blocks=5, in_channels=384, context_channels=320)
    target = meta_backbone(preset, preset.transformer_config()).state_dict()
    weights: Weights = {}
    for name, parts in BlackForestLabs().places(target, preset).items():
        for part in parts:
            rows = target[name].shape[0] // len(parts) // (part.stop - part.start) * part.of
            weights[part.name] = torch.empty(rows, *target[name].shape[1:], device="meta")
    config = BlackForestLabs().structure(weights)
    assert config is not None
    assert preset.with_config(config) is preset


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("own_names", [True, False])
def test_fp8_is_dequantized(stock: Weights, tmp_path: Path, scaled: bool, own_names: bool) -> None:
    weights = dict(stock) if own_names else black_forest_labs(stock)
    coded: Weights = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)} if scaled else {}
    expected: Weights = {}
    for name, tensor in weights.items():
        if not name.endswith("weight") or tensor.ndim != 2:
            coded[name] = expected[name] = tensor
            continue
        scale = tensor.abs().max() / 448 if scaled else torch.ones(())
        coded[name] = (tensor / scale).to(torch.float8_e4m3fn)
        if scaled:
            coded[name.removesuffix("weight") + "scale_weight"] = scale
            coded[name.removesuffix("weight") + "scale_input"] = torch.ones(())
        expected[name] = (coded[name].float() * scale).bfloat16().float()
    save_file(coded, tmp_path / "a.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, tmp_path / "plain.safetensors")
    plain = load_static(str(tmp_path / "plain.safetensors"), TINY).state_dict()
    assert_loads(tmp_path / "a.safetensors", plain)
    assert not all(torch.equal(plain[name], stock[name]) for name in stock)


def test_a_scale_for_each_row_is_refused(stock: Weights, tmp_path: Path) -> None:
    name = "transformer_blocks.0.attn.to_q.weight"
    coded = {
        **stock,
        name: stock[name].to(torch.float8_e4m3fn),
        name.replace("weight", "weight_scale"): torch.ones(128),
    }
    save_file(coded, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"128 scales, .* save it in bf16"):
        load_static(str(tmp_path / "a.safetensors"), TINY)


def test_gguf_is_dequantized(stock: Weights, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "flux")
    expected: Weights = {}
    for name, tensor in black_forest_labs(stock).items():
        quantized = tensor.ndim == 2 and tensor.shape[1] % 32 == 0
        values = gguf.quants.quantize(tensor.numpy(), kind.Q8_0) if quantized else tensor.numpy()
        writer.add_tensor(name, values, raw_dtype=kind.Q8_0 if quantized else None)
        expected[name] = torch.from_numpy(gguf.quants.dequantize(values, kind.Q8_0)) if quantized else tensor
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, tmp_path / "plain.safetensors")
    plain = load_static(str(tmp_path / "plain.safetensors"), TINY).state_dict()
    assert_loads(tmp_path / "a.gguf", plain)
    assert not all(torch.equal(plain[name], stock[name]) for name in stock)


def test_a_damaged_gguf_is_named(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(CheckpointError, match=r"a\.gguf"):
        load_static(str(tmp_path / "a.gguf"), TINY)


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao"])
def test_a_quantized_directory_is_refused_with_the_conversion(tmp_path: Path, method: str) -> None:
    """Even where its weights are plain: the configuration says that they are codes."""
    save_static(random_backbone(TINY), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    with pytest.raises(CheckpointError, match=rf"quantized by {method}; .*dequantize\(\)\.save_pretrained"):
        load_static(str(tmp_path), TINY)
    with pytest.raises(CheckpointError, match=f"quantized by {method}"):
        resolve_preset(None, str(tmp_path))


@pytest.mark.parametrize("sizes", [{"layers": 5}, {"patch_size": 4}, {"classes": 7}, {"sample_size": 16}])
def test_the_structure_of_a_published_file_is_read_off_shapes(tmp_path: Path, sizes: dict[str, int]) -> None:
    small = {"layers": 2, "patch_size": 2, "classes": 10, "sample_size": 8, **sizes}
    preset = DiTPreset(name="x", backbone="dit", hidden_size=64, heads=4, in_channels=2, learn_sigma=True, **small)
    torch.save(random_state(preset, routers=False), tmp_path / "own.pt")
    found = resolve_preset(None, str(tmp_path / "own.pt"))
    assert found.transformer_config() == preset.transformer_config()
    load_static(str(tmp_path / "own.pt"), found)


@pytest.mark.parametrize("model", ["flux-tiny", "latte-tiny"])
def test_a_published_file_of_another_backbone_is_named(tmp_path: Path, model: str) -> None:
    preset = DiTPreset(
        name="x",
        backbone="dit",
        layers=2,
        hidden_size=64,
        heads=4,
        in_channels=2,
        patch_size=2,
        sample_size=8,
        learn_sigma=True,
    )
    torch.save(random_state(preset, routers=False), tmp_path / "own.pt")
    with pytest.raises(CheckpointError, match=f"names of the published DiT and SiT code, and {model} takes"):
        load_static(str(tmp_path / "own.pt"), get_preset(model))
