"""LoRA files as trainers write them. Every key of a file is used, refused by name, or left out and reported."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dyexport import backbones
from dyexport.backbones.base import Preset
from dyexport.checkpoints.lora_config import configured, read_config
from dyexport.checkpoints.lora_translation import foreign_name, translate
from dyexport.checkpoints.stored_weights import SAFETENSORS, StoredWeights, listed
from dyexport.errors import CheckpointError
from dyexport.lora import PEFT_CONFIG, PEFT_WEIGHTS

if TYPE_CHECKING:
    from peft import LoraConfig

TEXT_ENCODERS = re.compile(r"lora_te\d?_|text_encoder(s|_\d)?\.|bundle_emb\.")
PREFIX = re.compile(r"(transformer\.|base_model\.model\.|module\.|diffusion_model\.|lora_unet_|lora_transformer_)*")
PEFT = "base_model.model."  # starts all names that peft writes
PART = re.compile(
    r"(.+?)\.(?:lora[_.])?(A|B|down|up|embedding_A|embedding_B|magnitude_vector)"
    r"(?:\.(?!weight|bias)(\w+))?(?:\.(weight|bias))?"
)
KINDS = {"down": "A", "up": "B"}
ALPHA = re.compile(r"(.+?)(?:\.lora)?\.alpha")
DOWN, UP, DOWN_EMBEDDING = "lora_A.weight", "lora_B.weight", "lora_embedding_A"  # peft's names in a LoRA layer
BIAS, MAGNITUDE = "lora_B.bias", "lora_magnitude_vector"


@dataclass(frozen=True, kw_only=True)
class Factors:
    """The LoRA of one module: ``tensors`` by peft's names in a LoRA layer, in fp32; ``key`` is one of the file's."""

    key: str
    tensors: Mapping[str, Tensor]
    alpha: float
    rank_stabilized: bool

    @property
    def rank(self) -> int:
        return len(self.tensors[DOWN if DOWN in self.tensors else DOWN_EMBEDDING])

    @property
    def options(self) -> dict[str, Any]:
        """Those of peft's ``LoraConfig`` that make a layer which takes the tensors."""
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "use_rslora": self.rank_stabilized,
            "use_dora": MAGNITUDE in self.tensors,
            "lora_bias": BIAS in self.tensors,
        }


@dataclass(kw_only=True)
class _Found:
    """Tensors of one module in a file; ``name`` is the trainer's, ``keys`` are the file's."""

    name: str
    keys: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    alpha: float | None = None

    @property
    def key(self) -> str:
        return next(iter(self.keys.values()))


def read_lora(file: Path, preset: Preset, stock: nn.Module) -> tuple[dict[str, Factors], list[str]]:
    """Factors by module of ``stock``, and the keys left out, of text encoders. Raises ``CheckpointError``."""
    if not file.is_file() or file.suffix != SAFETENSORS:
        raise CheckpointError(f"{file} is not a file of safetensors; --lora takes one, as trainers write it")
    stored = StoredWeights(file)
    modules = {name for name, _ in stock.named_modules(remove_duplicate=False) if name}
    text = [key for key in stored if TEXT_ENCODERS.match(key)]
    found = _by_module(file, {key: stored[key] for key in stored if not TEXT_ENCODERS.match(key)}, modules)
    if not found:
        what = f"only {listed(text)}, for text encoders" if text else "no LoRA"
        raise CheckpointError(f"{file} holds {what}; give a safetensors file with a LoRA of {preset.name}")
    config = read_config(file)
    factors = {name: _factors(file, parts, config) for name, parts in found.items()}
    foreign = {name: factors.pop(name) for name in found if name not in modules}
    loader: str | None = backbones.part(preset.backbone, "published").LORA_LOADER
    if foreign and loader is None:
        key = found[next(iter(foreign))].key
        raise CheckpointError(f"{file}: {key} is of no layer of {preset.name}; give a LoRA made for this model")
    _check_peft(file, [found[name] for name in factors], config)
    return _joined(file, factors, _translated(file, foreign, str(loader))), text


def _by_module(file: Path, tensors: Mapping[str, Tensor], modules: set[str]) -> dict[str, _Found]:
    """All that belongs together, by the stock model's name of the module or by a foreign one."""
    _check_one_adapter(file, tensors)
    flat = {name.replace(".", "_"): name for name in modules}
    found: dict[str, _Found] = {}
    for key, tensor in tensors.items():
        name, part = _split(file, key)
        bare = PREFIX.sub("", name, count=1)
        target = flat.get(bare.replace(".", "_"), foreign_name(bare))
        _add(file, found.setdefault(target, _Found(name=bare)), key, part, tensor)
    for parts in found.values():
        if not parts.tensors:
            raise CheckpointError(f"{file}: {parts.key} is the alpha of no factors; save the LoRA again")
    return found


def _check_one_adapter(file: Path, keys: Iterable[str]) -> None:
    """Factors of two adapters of one model do not belong together."""
    adapters = {found[3]: key for key in keys if (found := PART.fullmatch(key)) is not None and found[3]}
    if len(adapters) > 1:
        names = listed(adapters.values())
        raise CheckpointError(f"{file} holds several adapters, such as {names}; save each in a separate file")


def _split(file: Path, key: str) -> tuple[str, str]:
    """A key's module, and what of it: 'alpha', or peft's name of a tensor in a LoRA layer."""
    if (found := ALPHA.fullmatch(key)) is not None:
        return found[1], "alpha"
    if (found := PART.fullmatch(key)) is None:
        raise CheckpointError(f"{file}: {key} is no factor of a LoRA; only factors A and B and DoRA's can be merged")
    name, kind, leaf = found[1], KINDS.get(found[2], found[2]), found[4]
    return name, f"lora_{kind}.{leaf or 'weight'}" if kind in ("A", "B") else f"lora_{kind}"


def _add(file: Path, found: _Found, key: str, part: str, tensor: Tensor) -> None:
    if part in found.keys:
        raise CheckpointError(f"{file} holds both {found.keys[part]} and {key}, for one factor; remove one of them")
    found.keys[part] = key
    checked = _checked(file, key, tensor, scalar=part == "alpha")
    if part == "alpha":
        found.alpha = float(checked)
    else:
        found.tensors[part] = checked


def _checked(file: Path, key: str, tensor: Tensor, *, scalar: bool) -> Tensor:
    """The tensor in fp32."""
    if tensor.is_complex() or tensor.dtype == torch.bool or not (scalar or tensor.is_floating_point()):
        raise CheckpointError(f"{file}: {key} is stored as {tensor.dtype}; a LoRA's factors are real floating-point")
    if not tensor.numel() or (scalar and tensor.numel() != 1):
        want = "an alpha is one number" if scalar else "a LoRA has rank 1 or more"
        raise CheckpointError(f"{file}: {key} has shape {tuple(tensor.shape)}; {want}")
    if not (wide := tensor.float()).isfinite().all():
        raise CheckpointError(f"{file}: {key} holds NaN, infinity or values beyond fp32; the LoRA is broken")
    return wide


def _factors(file: Path, found: _Found, config: LoraConfig | None) -> Factors:
    """With alpha from the configuration, from the file, or else equal to the rank."""
    part = next((part for part in (DOWN, DOWN_EMBEDDING) if part in found.tensors), None)
    if part is None or not found.tensors[part].ndim:
        raise CheckpointError(f"{file}: {found.key} needs two matrices, A and B, and A is missing; save the LoRA again")
    rank = len(found.tensors[part])
    if config is None:
        alpha = rank if found.alpha is None else found.alpha
        return Factors(key=found.key, tensors=found.tensors, alpha=alpha, rank_stabilized=False)
    if found.alpha is not None:
        raise CheckpointError(f"{file}: {found.keys['alpha']} is a second alpha, the configuration has one; remove it")
    try:
        expected = configured(config, found.name)
    except (ArithmeticError, AttributeError, TypeError, ValueError, re.error) as error:
        raise CheckpointError(f"{file}: its configuration has no rank or alpha for {found.key}: {error}") from error
    if expected is None:
        raise CheckpointError(f"{file}: {found.key} is no target of its configuration; keep the one saved with it")
    held = {"r": rank, "use_dora": MAGNITUDE in found.tensors, "lora_bias": BIAS in found.tensors}
    for option, value in held.items():
        if value != expected[option]:
            raise CheckpointError(
                f"{file}: {found.key} has {option} {value}, its configuration says {expected[option]}; "
                "keep the one saved with it"
            )
    return Factors(
        key=found.key, tensors=found.tensors, alpha=expected["lora_alpha"], rank_stabilized=bool(config.use_rslora)
    )


def _check_peft(file: Path, found: list[_Found], config: LoraConfig | None) -> None:
    """peft's weights mean nothing without the configuration, which alone has alpha."""
    bare = [parts.key for parts in found if parts.key.startswith(PEFT) and parts.alpha is None]
    if config is None and bare:
        raise CheckpointError(
            f"{file} holds {bare[0]}, as peft writes it, without alpha; keep {PEFT_CONFIG} next to it, "
            f"and its name {PEFT_WEIGHTS}"
        )


def _translated(file: Path, foreign: Mapping[str, Factors], loader: str) -> dict[str, Factors]:
    """By diffusers' names."""
    translated: dict[str, Factors] = {}
    for name, factors in foreign.items():
        if set(factors.tensors) != {DOWN, UP}:
            held = ", ".join(sorted(factors.tensors))
            raise CheckpointError(f"{file}: {factors.key} is of {held}; by such names only A and B can be merged")
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in translate(loader, file, factors.key, name, factors.tensors).items():
            module, part = _split(file, PREFIX.sub("", key, count=1))
            parts.setdefault(module, {})[part] = tensor
        split = {module: _split_off(tensors, factors) for module, tensors in parts.items()}
        translated = _joined(file, translated, split)
    return translated


def _split_off(tensors: Mapping[str, Tensor], origin: Factors) -> Factors:
    """As strong as the factors it came from, of which its rank may be a part."""
    share = len(tensors[DOWN]) / origin.rank
    alpha = origin.alpha * (share**0.5 if origin.rank_stabilized else share)
    return Factors(key=origin.key, tensors=tensors, alpha=alpha, rank_stabilized=origin.rank_stabilized)


def _joined(file: Path, own: Mapping[str, Factors], translated: Mapping[str, Factors]) -> dict[str, Factors]:
    if both := sorted(own.keys() & translated.keys()):
        keys = " and ".join(factors[both[0]].key for factors in (own, translated))
        raise CheckpointError(f"{file} holds two LoRAs of {both[0]}, {keys}; remove one of them")
    return {**own, **translated}
