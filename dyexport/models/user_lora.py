"""A user's LoRA, in the formats of diffusers and peft, merged into a stock transformer tensor by tensor.

diffusers and peft merge into a module in memory; here a 12-billion-parameter one need not be there. What foreign
trainers write for FLUX (kohya, XLabs, fal) is translated by diffusers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dyexport.architectures import FluxPreset, Preset
from dyexport.errors import CheckpointError
from dyexport.models.stored import SAFETENSORS, StoredWeights

PREFIXES = r"(?:transformer\.|base_model\.model\.|module\.)*"
FACTOR = re.compile(rf"{PREFIXES}(.+?)\.(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(?:\.default)?\.weight")
ALPHA = re.compile(rf"{PREFIXES}(.+?)(?:\.lora)?\.alpha")
METADATA = "lora_adapter_metadata"  # where diffusers keeps the adapter's configuration; peft has a file
CONFIG = "adapter_config.json"


@dataclass(frozen=True, kw_only=True)
class Update:
    """scale * up @ down is added to a weight (out, in)."""

    down: Tensor  # (r, in)
    up: Tensor  # (out, r)
    scale: float


class UserLora(Mapping[str, Update]):
    """Updates by the names of the weights they are added to."""

    def __init__(self, file: Path, preset: Preset, scale: float = 1.0) -> None:
        """Raises ``CheckpointError`` for what is not a LoRA of a transformer, in factors A and B."""
        self.file = file
        tensors, alphas = _read(file, preset)
        factors: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if (found := ALPHA.fullmatch(name)) is not None:
                alphas[found[1]] = float(tensor)
            elif (found := FACTOR.fullmatch(name)) is not None:
                factors.setdefault(found[1], {})["down" if found[2].endswith(("_A", "down")) else "up"] = tensor.float()
            else:
                raise CheckpointError(f"{file}: {name} is no factor of a transformer's LoRA; give one of {preset.name}")
        self._updates = {f"{n}.weight": self._update(n, parts, alphas, scale) for n, parts in factors.items()}
        if not factors:
            raise CheckpointError(f"{file} holds no LoRA; give a safetensors file with lora_A and lora_B")

    def _update(self, name: str, parts: dict[str, Tensor], alphas: Mapping[str, float], scale: float) -> Update:
        if len(parts) != 2 or any(part.ndim != 2 for part in parts.values()):
            raise CheckpointError(f"{self.file}: {name} needs two matrices, A and B; save the LoRA again")
        rank = len(parts["down"])
        alpha = alphas.get(name, alphas.get("", rank))
        return Update(**parts, scale=scale * alpha / rank)

    def check(self, weights: Mapping[str, Tensor], model: str) -> None:
        """Raises ``CheckpointError`` for a weight that the model does not have, or has in another shape."""
        for name, update in self.items():
            if name not in weights:
                raise CheckpointError(f"{self.file}: {model} has no {name}; give a LoRA made for this model")
            shape = (len(update.up), update.down.shape[1])
            if len(update.down) != update.up.shape[1] or shape != tuple(weights[name].shape):
                raise CheckpointError(
                    f"{self.file}: the LoRA of {name} is {tuple(update.up.shape)} @ {tuple(update.down.shape)}, "
                    f"{model} has {tuple(weights[name].shape)}; give a LoRA made for this model"
                )

    def __getitem__(self, name: str) -> Update:
        return self._updates[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._updates)

    def __len__(self) -> int:
        return len(self._updates)


class MergedWeights(Mapping[str, Tensor]):
    """Weights with LoRAs in them, each made when it is asked for."""

    def __init__(self, weights: Mapping[str, Tensor], loras: Sequence[UserLora]) -> None:
        self._weights, self._loras = weights, loras

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name]
        updates = [lora[name] for lora in self._loras if name in lora]
        if not updates:
            return weight
        change = sum(update.scale * (update.up @ update.down) for update in updates)
        return (weight.float() + change).to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _read(file: Path, preset: Preset) -> tuple[Mapping[str, Tensor], dict[str, float]]:
    """Tensors by diffusers' names, and alphas by module, '' being the default of those that have none."""
    if not file.is_file() or file.suffix != SAFETENSORS:
        raise CheckpointError(f"{file} is not a file of safetensors; --lora takes one, as diffusers and peft write it")
    tensors = dict(StoredWeights(file))
    alphas = _alphas(file)
    if not isinstance(preset, FluxPreset):
        return tensors, alphas
    from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin

    try:
        translated, found = FluxLoraLoaderMixin.lora_state_dict(tensors, return_alphas=True)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise CheckpointError(f"{file} is no LoRA of FLUX that diffusers knows: {error}") from error
    return {**translated, **{name: torch.as_tensor(value) for name, value in (found or {}).items()}}, alphas


def _alphas(file: Path) -> dict[str, float]:
    """What the configuration of the adapter says, in the file's header or beside it."""
    try:
        with safe_open(file, framework="pt") as stored:
            text = (stored.metadata() or {}).get(METADATA)
        beside = file.with_name(CONFIG)
        if text is None and beside.is_file():
            text = beside.read_text(encoding="utf-8")
        config: dict[str, Any] = {k.removeprefix("transformer."): v for k, v in json.loads(text or "{}").items()}
    except (OSError, SafetensorError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the configuration of {file} cannot be read: {error}") from error
    if config.get("use_dora") or config.get("use_rslora"):
        raise CheckpointError(f"{file} is a DoRA or a rank-stabilised LoRA; only the plain kind can be merged")
    default = {} if config.get("lora_alpha") is None else {"": float(config["lora_alpha"])}
    return {**default, **{name: float(value) for name, value in (config.get("alpha_pattern") or {}).items()}}
