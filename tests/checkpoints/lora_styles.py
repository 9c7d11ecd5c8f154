"""LoRAs that peft made of a stock FLUX, written under the names that other trainers use."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from dyexport.backbones.base import Preset
from dyexport.models.random_weights import random_backbone

State = dict[str, Tensor]
Writer = Callable[[PeftModel, Path], Path]

BFL = {  # diffusers' layers by Black Forest Labs' names, in the order of their rows
    r"transformer_blocks.(\d+).attn.to_out.0": r"double_blocks.\1.img_attn.proj",
    r"transformer_blocks.(\d+).attn.to_add_out": r"double_blocks.\1.txt_attn.proj",
    r"transformer_blocks.(\d+).ff.net.0.proj": r"double_blocks.\1.img_mlp.0",
    r"transformer_blocks.(\d+).ff.net.2": r"double_blocks.\1.img_mlp.2",
    r"transformer_blocks.(\d+).ff_context.net.0.proj": r"double_blocks.\1.txt_mlp.0",
    r"transformer_blocks.(\d+).ff_context.net.2": r"double_blocks.\1.txt_mlp.2",
    r"transformer_blocks.(\d+).norm1.linear": r"double_blocks.\1.img_mod.lin",
    r"transformer_blocks.(\d+).norm1_context.linear": r"double_blocks.\1.txt_mod.lin",
    r"single_transformer_blocks.(\d+).proj_out": r"single_blocks.\1.linear2",
    r"single_transformer_blocks.(\d+).norm.linear": r"single_blocks.\1.modulation.lin",
    r"x_embedder": "img_in",
    r"context_embedder": "txt_in",
    r"time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    r"time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    r"time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    r"time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    r"time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    r"time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    r"norm_out.linear": "final_layer.adaLN_modulation.1",
    r"proj_out": "final_layer.linear",
}
QKV = {
    "attn.to_q": "img_attn.qkv",
    "attn.to_k": "img_attn.qkv",
    "attn.to_v": "img_attn.qkv",
    "attn.add_q_proj": "txt_attn.qkv",
    "attn.add_k_proj": "txt_attn.qkv",
    "attn.add_v_proj": "txt_attn.qkv",
}
XLABS = {"img_attn.proj": "proj_lora1", "txt_attn.proj": "proj_lora2"} | {
    "img_attn.qkv": "qkv_lora1",
    "txt_attn.qkv": "qkv_lora2",
}


def adapted(preset: Preset, targets: str, **options: Any) -> PeftModel:
    """A stock module with a LoRA of rank 4 that has been trained, as far as numbers go."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, **options})
    model = get_peft_model(random_backbone(preset), config)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) / 10)
    return model


def share_down(model: PeftModel) -> None:
    """Make A of q, k and v one, as in a LoRA of the three as one layer."""
    layers = dict(model.named_modules())
    for name, layer in layers.items():
        for first, others in (("to_q", ("to_k", "to_v")), ("add_q_proj", ("add_k_proj", "add_v_proj"))):
            if name.endswith(first) and hasattr(layer, "lora_A"):
                for other in others:
                    same: Any = layers[name.removesuffix(first) + other]
                    same.lora_A["default"].weight.data = layer.lora_A["default"].weight.data.clone()


def peft(model: PeftModel, root: Path) -> Path:
    model.save_pretrained(str(root / "peft"))
    return root / "peft/adapter_model.safetensors"


def diffusers(model: PeftModel, root: Path, **others: Any) -> Path:
    """As diffusers' training scripts end, with the configuration in the header."""
    given: Any = {"transformer": model.base_model}
    FluxPipeline.save_lora_weights(
        str(root),
        transformer_lora_layers=state_of(model),
        **_collate_lora_metadata(given),
        **others,
    )
    return root / "pytorch_lora_weights.safetensors"


def ai_toolkit(model: PeftModel, root: Path) -> Path:
    """alpha is the rank and is not stored."""
    return _saved({f"transformer.{key}": tensor for key, tensor in state_of(model).items()}, root)


def one_trainer(model: PeftModel, root: Path) -> Path:
    return _saved(_flat(_down_up(state_of(model), alphas_of(model)), "lora_transformer_"), root)


def kohya(model: PeftModel, root: Path) -> Path:
    return _saved(_flat(_down_up(*_fused(model)), "lora_unet_"), root)


def comfy(model: PeftModel, root: Path) -> Path:
    return _saved({f"diffusion_model.{key}": tensor for key, tensor in _down_up(*_fused(model)).items()}, root)


def comfy_peft(model: PeftModel, root: Path) -> Path:
    """Black Forest Labs' names with peft's A and B; alpha is the rank."""
    return _saved({f"diffusion_model.{key}": tensor for key, tensor in _fused(model)[0].items()}, root)


def fal(model: PeftModel, root: Path) -> Path:
    return _saved({f"base_model.model.{key}": tensor for key, tensor in _fused(model)[0].items()}, root)


def xlabs(model: PeftModel, root: Path) -> Path:
    """Attention of double blocks alone; alpha is the rank."""
    state: State = {}
    for key, tensor in _down_up(_fused(model)[0], {}).items():
        block, name, kind = re.fullmatch(r"(double_blocks\.\d+)\.(\w+\.\w+)\.lora_(\w+)\.weight", key).groups()  # type: ignore[union-attr]
        state[f"{block}.processor.{XLABS[name]}.{kind}.weight"] = tensor
    return _saved(state, root)


def state_of(model: PeftModel) -> State:
    """Factors by names without a prefix."""
    return {key.removeprefix("base_model.model."): value for key, value in get_peft_model_state_dict(model).items()}


def alphas_of(model: PeftModel) -> dict[str, float]:
    layers = ((name.removeprefix("base_model.model."), layer) for name, layer in model.named_modules())
    return {name: layer.lora_alpha["default"] for name, layer in layers if hasattr(layer, "lora_alpha")}


def _fused(model: PeftModel) -> tuple[State, dict[str, float]]:
    """Factors and alphas by Black Forest Labs' names: q, k and v are one layer, shift and scale change places."""
    state, alphas = state_of(model), alphas_of(model)
    found: State = {}
    parts: dict[str, list[str]] = {}
    for name in alphas:
        parts.setdefault(_bfl(name), []).append(name)
    for target, names in parts.items():
        downs, ups = ([state[f"{name}.lora_{kind}.weight"] for name in names] for kind in "AB")
        if target.endswith("adaLN_modulation.1"):
            ups = [torch.cat(ups[0].chunk(2)[::-1])]
        shared = all(torch.equal(downs[0], down) for down in downs)
        found[f"{target}.lora_A.weight"] = downs[0].clone() if shared else torch.cat(downs)
        found[f"{target}.lora_B.weight"] = torch.cat(ups) if shared else torch.block_diag(*ups)
        alphas[target] = alphas[names[0]] * (1 if shared else len(names))
    return found, {target: alphas[target] for target in parts}


def _bfl(name: str) -> str:
    for pattern, target in BFL.items():
        if re.fullmatch(pattern, name):
            return re.sub(pattern, target, name)
    _, block, layer = name.split(".", 2)
    return f"double_blocks.{block}.{QKV[layer]}"


def _down_up(state: State, alphas: Mapping[str, float]) -> State:
    named = {key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): value for key, value in state.items()}
    return named | {f"{name}.alpha": torch.tensor(float(alpha)) for name, alpha in alphas.items()}


def _flat(state: State, prefix: str) -> State:
    """Dots of the layer's name become underscores."""
    split = (re.fullmatch(r"(.+)(\.(?:lora_\w+\.weight|alpha))", key) for key in state)
    return {
        prefix + found[1].replace(".", "_") + found[2]: tensor
        for found, tensor in zip(split, state.values(), strict=True)
        if found is not None
    }


def _saved(state: State, root: Path) -> Path:
    root.mkdir(exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, root / "lora.safetensors")
    return root / "lora.safetensors"


def change_config(file: Path, **values: Any) -> None:
    """Change what stands in peft's configuration next to a file."""
    config = file.with_name("adapter_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | values))


def layers_of(model: PeftModel) -> list[str]:
    return list(alphas_of(model))


def merged(model: PeftModel) -> nn.Module:
    """The truth: what peft makes of it."""
    whole: nn.Module = model.merge_and_unload()
    return whole
