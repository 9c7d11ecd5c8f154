"""The configuration that peft stores with a LoRA, in the file's header (diffusers) or in a separate file (peft)."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from dyexport.errors import CheckpointError
from dyexport.lora import lora_sources

if TYPE_CHECKING:
    from peft import LoraConfig

METADATA = "lora_adapter_metadata"  # diffusers' entry in the header
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")  # initializations that do not change base weights
VARIANT = "is_lora_variant"  # metadata of options of newer peft that change what a layer computes
REFUSED = (
    *("layer_replication", "target_parameters", "modules_to_save", "trainable_token_indices"),
    *("use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config"),
)


def read_config(file: Path) -> LoraConfig | None:
    """Read the configuration with peft; None where a LoRA has none.

    Raises ``CheckpointError`` naming an option that cannot be merged.
    """
    from peft import LoraConfig

    values = _stored_config(file)
    if not values:
        return None
    if (kind := values.get("peft_type", "LORA")) != "LORA":
        raise CheckpointError(f"{file} is a {kind}; only a LoRA can be merged")
    if (initialization := values.get("init_lora_weights", True)) not in KEEPS_BASE:
        raise CheckpointError(
            f"{file}: its initialization {initialization!r} moves the base weights; save it again as a plain LoRA, "
            "with peft's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    known = {option.name: bool(option.metadata.get(VARIANT)) for option in fields(LoraConfig)}
    refused = [name for name in values if name != "use_dora" and (name in REFUSED or known.get(name, True))]
    if used := [name for name in refused if values[name]]:
        raise CheckpointError(f"{file}: its configuration has {used[0]}, which cannot be merged; train without it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they concern training
            return LoraConfig(**{name: value for name, value in values.items() if name in known})
    except (TypeError, ValueError, ImportError) as error:
        raise CheckpointError(f"{file}: peft cannot read its configuration: {error}") from error


def module_options(config: LoraConfig, module: str) -> dict[str, Any] | None:
    """Return a module's options, matched by peft's rules for names and patterns; None where it is no target.

    Raises ``ValueError`` for an alpha that is not finite, and what peft and ``re`` raise for invalid patterns.
    """
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    if config.target_modules not in (None, "all-linear") and not check_target_module_exists(config, module):
        return None
    ranks, alphas = config.rank_pattern, config.alpha_pattern
    alpha = float(alphas.get(get_pattern_key(list(alphas), module), config.lora_alpha))
    if not math.isfinite(alpha):
        raise ValueError(f"alpha is {alpha}")
    return {
        "r": ranks.get(get_pattern_key(list(ranks), module), config.r),
        "lora_alpha": alpha,
        "use_dora": config.use_dora,
        "lora_bias": config.lora_bias,
    }


def _stored_config(file: Path) -> Mapping[str, Any]:
    """Read the entries in the header, else in the file next to the weights, without diffusers' prefix."""
    try:
        with safe_open(file, framework="pt") as stored:
            text = (stored.metadata() or {}).get(METADATA)
        for neighbor in lora_sources(file)[1:] if text is None else ():
            text = neighbor.read_text(encoding="utf-8")
        values = dict(json.loads(text or "{}"))
    except (OSError, SafetensorError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"the configuration of {file} cannot be read: {error}") from error
    return {key.removeprefix("transformer."): value for key, value in values.items() if "text_encoder" not in key}
