"""Reading of LoRA files of several trainers. Each key is used, raises an error that names it, or is reported."""

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
from dyexport.checkpoints.locate import SAFETENSORS
from dyexport.checkpoints.lora_config import module_options, read_config
from dyexport.checkpoints.lora_translation import converter_name, translate
from dyexport.checkpoints.stored_weights import StoredWeights
from dyexport.checkpoints.weight_files import listed
from dyexport.errors import CheckpointError
from dyexport.lora import PEFT_CONFIG, PEFT_WEIGHTS

if TYPE_CHECKING:
    from peft import LoraConfig

TEXT_ENCODERS = re.compile(r"lora_te\d?_|text_encoder(s|_\d)?\.|bundle_emb\.")
PREFIX = re.compile(r"(transformer\.|base_model\.model\.|module\.|diffusion_model\.|lora_unet_|lora_transformer_)*")
PEFT = "base_model.model."  # prefix of all names that peft writes
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
    """The LoRA of one module.

    key      one of the file's keys, for errors
    tensors  in fp32, by peft's names in a LoRA layer
    """

    key: str
    tensors: Mapping[str, Tensor]
    alpha: float
    rank_stabilized: bool

    @property
    def rank(self) -> int:
        """Rank r of the factors."""
        return len(self.tensors[DOWN if DOWN in self.tensors else DOWN_EMBEDDING])

    @property
    def options(self) -> dict[str, Any]:
        """Options of peft's ``LoraConfig`` that make a layer for these tensors."""
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "use_rslora": self.rank_stabilized,
            "use_dora": MAGNITUDE in self.tensors,
            "lora_bias": BIAS in self.tensors,
        }


@dataclass(kw_only=True)
class _ModuleTensors:
    """Tensors of one module in a file: ``name`` is the trainer's name, ``keys`` are the file's keys, by part."""

    name: str
    keys: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    alpha: float | None = None

    @property
    def key(self) -> str:
        return next(iter(self.keys.values()))


def read_lora(file: Path, preset: Preset, stock: nn.Module) -> tuple[dict[str, Factors], list[str]]:
    """Return factors by module of ``stock``, and the keys of text encoders, which are left out.

    Raises ``CheckpointError``.
    """
    if not file.is_file() or file.suffix != SAFETENSORS:
        raise CheckpointError(f"{file} is not a file of safetensors; --lora takes one, as trainers write it")
    stored = StoredWeights(file)
    modules = {name for name, _ in stock.named_modules(remove_duplicate=False) if name}
    text = [key for key in stored if TEXT_ENCODERS.match(key)]
    grouped = _by_module(file, {key: stored[key] for key in stored if not TEXT_ENCODERS.match(key)}, modules)
    if not grouped:
        content = f"only {listed(text)}, for text encoders" if text else "no LoRA"
        raise CheckpointError(f"{file} holds {content}; give a safetensors file with a LoRA of {preset.name}")
    config = read_config(file)
    factors = {name: _factors(file, module, config) for name, module in grouped.items()}
    untranslated = {name: factors.pop(name) for name in grouped if name not in modules}
    loader: str | None = backbones.part(preset.backbone, "published").LORA_LOADER
    if untranslated and loader is None:
        key = grouped[next(iter(untranslated))].key
        raise CheckpointError(f"{file}: {key} is of no layer of {preset.name}; give a LoRA made for this model")
    _check_peft(file, [grouped[name] for name in factors], config)
    return _merge(file, factors, _translate_all(file, untranslated, str(loader))), text


def _by_module(file: Path, tensors: Mapping[str, Tensor], modules: set[str]) -> dict[str, _ModuleTensors]:
    """Group tensors by module: by its name in the stock model, or by the name that diffusers' converters expect."""
    _check_one_adapter(file, tensors)
    flat = {name.replace(".", "_"): name for name in modules}
    grouped: dict[str, _ModuleTensors] = {}
    for key, tensor in tensors.items():
        name, part = _split(file, key)
        bare = PREFIX.sub("", name, count=1)
        target = flat.get(bare.replace(".", "_"), converter_name(bare))
        _add(file, grouped.setdefault(target, _ModuleTensors(name=bare)), key, part, tensor)
    for module in grouped.values():
        if not module.tensors:
            raise CheckpointError(f"{file}: {module.key} is the alpha of no factors; save the LoRA again")
    return grouped


def _check_one_adapter(file: Path, keys: Iterable[str]) -> None:
    """Check that all factors belong to one adapter. Raises ``CheckpointError``."""
    adapters = {match[3]: key for key in keys if (match := PART.fullmatch(key)) is not None and match[3]}
    if len(adapters) > 1:
        names = listed(adapters.values())
        raise CheckpointError(f"{file} holds several adapters, such as {names}; save each in a separate file")


def _split(file: Path, key: str) -> tuple[str, str]:
    """Split a key into the module's name and the part: ``alpha``, or peft's name of a tensor in a LoRA layer."""
    if (match := ALPHA.fullmatch(key)) is not None:
        return match[1], "alpha"
    if (match := PART.fullmatch(key)) is None:
        raise CheckpointError(f"{file}: {key} is no factor of a LoRA; only factors A and B and DoRA's can be merged")
    name, kind, leaf = match[1], KINDS.get(match[2], match[2]), match[4]
    return name, f"lora_{kind}.{leaf or 'weight'}" if kind in ("A", "B") else f"lora_{kind}"


def _add(file: Path, module: _ModuleTensors, key: str, part: str, tensor: Tensor) -> None:
    if part in module.keys:
        raise CheckpointError(f"{file} holds both {module.keys[part]} and {key}, for one factor; remove one of them")
    module.keys[part] = key
    checked = _checked(file, key, tensor, scalar=part == "alpha")
    if part == "alpha":
        module.alpha = float(checked)
    else:
        module.tensors[part] = checked


def _checked(file: Path, key: str, tensor: Tensor, *, scalar: bool) -> Tensor:
    """Return a tensor in fp32. Raises ``CheckpointError`` for a type, shape or values that a LoRA cannot have."""
    if tensor.is_complex() or tensor.dtype == torch.bool or not (scalar or tensor.is_floating_point()):
        raise CheckpointError(f"{file}: {key} is stored as {tensor.dtype}; a LoRA's factors are real floating-point")
    if not tensor.numel() or (scalar and tensor.numel() != 1):
        rule = "an alpha is one number" if scalar else "a LoRA has rank 1 or more"
        raise CheckpointError(f"{file}: {key} has shape {tuple(tensor.shape)}; {rule}")
    if not (wide := tensor.float()).isfinite().all():
        raise CheckpointError(f"{file}: {key} holds NaN, infinity or values beyond fp32; the LoRA is broken")
    return wide


def _factors(file: Path, module: _ModuleTensors, config: LoraConfig | None) -> Factors:
    """Make the factors of a module. Alpha is that of the configuration or of the file, by default the rank."""
    part = next((part for part in (DOWN, DOWN_EMBEDDING) if part in module.tensors), None)
    if part is None or not module.tensors[part].ndim:
        raise CheckpointError(
            f"{file}: {module.key} needs two matrices, A and B, and A is missing; save the LoRA again"
        )
    rank = len(module.tensors[part])
    if config is None:
        alpha = rank if module.alpha is None else module.alpha
        return Factors(key=module.key, tensors=module.tensors, alpha=alpha, rank_stabilized=False)
    if module.alpha is not None:
        raise CheckpointError(f"{file}: {module.keys['alpha']} is a second alpha, the configuration has one; remove it")
    try:
        expected = module_options(config, module.name)
    except (ArithmeticError, AttributeError, TypeError, ValueError, re.error) as error:
        raise CheckpointError(f"{file}: its configuration has no rank or alpha for {module.key}: {error}") from error
    if expected is None:
        raise CheckpointError(f"{file}: {module.key} is no target of its configuration; keep the one saved with it")
    stored = {"r": rank, "use_dora": MAGNITUDE in module.tensors, "lora_bias": BIAS in module.tensors}
    for option, value in stored.items():
        if value != expected[option]:
            raise CheckpointError(
                f"{file}: {module.key} has {option} {value}, its configuration says {expected[option]}; "
                "keep the one saved with it"
            )
    return Factors(
        key=module.key, tensors=module.tensors, alpha=expected["lora_alpha"], rank_stabilized=bool(config.use_rslora)
    )


def _check_peft(file: Path, modules: list[_ModuleTensors], config: LoraConfig | None) -> None:
    """Check that weights in peft's form have a configuration: they are useless without its alpha."""
    bare = [module.key for module in modules if module.key.startswith(PEFT) and module.alpha is None]
    if config is None and bare:
        raise CheckpointError(
            f"{file} holds {bare[0]}, as peft writes it, without alpha; keep {PEFT_CONFIG} next to it, "
            f"and its name {PEFT_WEIGHTS}"
        )


def _translate_all(file: Path, untranslated: Mapping[str, Factors], loader: str) -> dict[str, Factors]:
    """Return factors by diffusers' names. Raises ``CheckpointError``."""
    translated: dict[str, Factors] = {}
    for name, factors in untranslated.items():
        if set(factors.tensors) != {DOWN, UP}:
            stored = ", ".join(sorted(factors.tensors))
            raise CheckpointError(f"{file}: {factors.key} is of {stored}; by such names only A and B can be merged")
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in translate(loader, file, factors.key, name, factors.tensors).items():
            module, part = _split(file, PREFIX.sub("", key, count=1))
            parts.setdefault(module, {})[part] = tensor
        split = {module: _with_same_scale(tensors, factors) for module, tensors in parts.items()}
        translated = _merge(file, translated, split)
    return translated


def _with_same_scale(tensors: Mapping[str, Tensor], origin: Factors) -> Factors:
    """Make factors of tensors that were split off ``origin``, with an alpha that keeps the scale at a lower rank."""
    share = len(tensors[DOWN]) / origin.rank
    alpha = origin.alpha * (share**0.5 if origin.rank_stabilized else share)
    return Factors(key=origin.key, tensors=tensors, alpha=alpha, rank_stabilized=origin.rank_stabilized)


def _merge(file: Path, first: Mapping[str, Factors], second: Mapping[str, Factors]) -> dict[str, Factors]:
    """Return the factors of both. Raises ``CheckpointError`` for a module that is in both."""
    if both := sorted(first.keys() & second.keys()):
        keys = " and ".join(factors[both[0]].key for factors in (first, second))
        raise CheckpointError(f"{file} holds two LoRAs of {both[0]}, {keys}; remove one of them")
    return {**first, **second}
