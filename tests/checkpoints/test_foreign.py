"""Files by other names and in other formats: read as diffusers reads them, or refused with the conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dyexport.backbones.flux.preset import FluxPreset
from dyexport.checkpoints.static import load_static
from dyexport.errors import CheckpointError
from dyexport.models.random_weights import random_backbone
from dyexport.presets import get_preset

FLUX = get_preset("flux-tiny")
assert isinstance(FLUX, FluxPreset)
PREFIX = "model.diffusion_model."


def original(preset: FluxPreset, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names and fused layers of Black Forest Labs' files."""
    names: dict[str, list[str]] = {"img_in": ["x_embedder"], "txt_in": ["context_embedder"]}
    names["final_layer.linear"], names["final_layer.adaLN_modulation.1"] = ["proj_out"], ["norm_out.linear"]
    embedders = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}
    for own, stock in embedders.items():
        for layer, number in (("in_layer", 1), ("out_layer", 2)):
            names[f"{own}.{layer}"] = [f"time_text_embed.{stock}.linear_{number}"]
    for index in range(preset.double_blocks):
        own, stock = f"double_blocks.{index}", f"transformer_blocks.{index}"
        for stream, norm, qkv, out, feed, norms in (
            ("img", "norm1", "to_{}", "to_out.0", "ff", "norm_{}"),
            ("txt", "norm1_context", "add_{}_proj", "to_add_out", "ff_context", "norm_added_{}"),
        ):
            names[f"{own}.{stream}_mod.lin"] = [f"{stock}.{norm}.linear"]
            names[f"{own}.{stream}_attn.qkv"] = [f"{stock}.attn.{qkv.format(part)}" for part in "qkv"]
            names[f"{own}.{stream}_attn.proj"] = [f"{stock}.attn.{out}"]
            names[f"{own}.{stream}_mlp.0"] = [f"{stock}.{feed}.net.0.proj"]
            names[f"{own}.{stream}_mlp.2"] = [f"{stock}.{feed}.net.2"]
            for kind, part in (("query", "q"), ("key", "k")):
                names[f"{own}.{stream}_attn.norm.{kind}_norm"] = [f"{stock}.attn.{norms.format(part)}"]
    for index in range(preset.single_blocks):
        own, stock = f"single_blocks.{index}", f"single_transformer_blocks.{index}"
        names[f"{own}.modulation.lin"] = [f"{stock}.norm.linear"]
        names[f"{own}.linear1"] = [*(f"{stock}.attn.to_{part}" for part in "qkv"), f"{stock}.proj_mlp"]
        names[f"{own}.linear2"] = [f"{stock}.proj_out"]
        for kind, part in (("query", "q"), ("key", "k")):
            names[f"{own}.norm.{kind}_norm"] = [f"{stock}.attn.norm_{part}"]
    file: dict[str, Tensor] = {}
    for own, parts in names.items():
        for kind in ("weight", "bias"):
            tensors = [state[f"{part}.{kind}"] for part in parts if f"{part}.{kind}" in state]
            if tensors:
                fused = torch.cat(tensors)
                fused = torch.cat(fused.chunk(2)[::-1]) if "adaLN" in own else fused
                file[f"{own}.scale" if own.endswith("_norm") else f"{own}.{kind}"] = fused.clone()
    return file


def state_of(preset: FluxPreset) -> dict[str, Tensor]:
    return dict(random_backbone(preset).state_dict())


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_an_original_file_is_read_by_its_names(prefix: str, tmp_path: Path) -> None:
    state = state_of(FLUX)
    save_file({f"{prefix}{k}": v for k, v in original(FLUX, state).items()}, tmp_path / "flux.safetensors")
    loaded = load_static(str(tmp_path / "flux.safetensors"), FLUX).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("scaled", [False, True])
def test_fp8_is_read_as_bf16(scaled: bool, tmp_path: Path) -> None:
    file: dict[str, Any] = {}
    expected: dict[str, Tensor] = {}
    for name, tensor in original(FLUX, state_of(FLUX)).items():
        scale = torch.tensor(0.25) if scaled and name.endswith(".weight") else torch.tensor(1.0)
        small = tensor.to(torch.float8_e4m3fn)
        file[f"{PREFIX}{name}"] = small
        expected[name] = (small.float() * scale).bfloat16().float()
        if scaled and name.endswith(".weight"):
            file[f"{PREFIX}{name.removesuffix('.weight')}.scale_weight"] = scale
    if scaled:
        file["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(file, tmp_path / "fp8.safetensors")
    loaded = original(FLUX, dict(load_static(str(tmp_path / "fp8.safetensors"), FLUX).state_dict()))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_a_file_that_lacks_a_layer_names_what_is_missing(tmp_path: Path) -> None:
    file = original(FLUX, state_of(FLUX))
    del file["double_blocks.1.img_mlp.0.weight"]
    save_file(file, tmp_path / "flux.safetensors")
    assert load_file(tmp_path / "flux.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks double_blocks\.1\.img_mlp\.0\.weight;"):
        load_static(str(tmp_path / "flux.safetensors"), FLUX)
