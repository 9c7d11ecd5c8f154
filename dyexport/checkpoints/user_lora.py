"""LoRAs of users, merged into a stock transformer tensor by tensor.

peft merges one module at a time, so that a transformer of 12 billion parameters need not be in memory.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dyexport.backbones.base import Preset
from dyexport.checkpoints.lora_files import BIAS, Factors, read_lora
from dyexport.checkpoints.weight_files import listed
from dyexport.errors import CheckpointError, DyexportWarning
from dyexport.lora import LoraFile

LAYER = "layer"


class UserLora:
    """One LoRA, checked against the stock module, which may be on the meta device."""

    def __init__(self, lora: LoraFile, preset: Preset, stock: nn.Module) -> None:
        """Read and check a LoRA; warn of factors for text encoders, which are not merged.

        Raises ``CheckpointError`` for a file that is not a LoRA of this transformer.
        """
        self.file, self.scale = lora.file, lora.scale
        self._stock = stock
        self._factors, left_out = read_lora(lora.file, preset, stock)
        for name, factors in self._factors.items():
            self._check(name, factors, preset.name)
        if left_out:
            warnings.warn(
                f"{self.file}: only the transformer's LoRA is merged; left out are {listed(left_out)}, "
                "for text encoders, which are not part of a bundle",
                DyexportWarning,
                stacklevel=1,
            )

    def changes(self, name: str) -> bool:
        """Return whether the LoRA changes a weight, by its name in the stock module."""
        module, _, leaf = name.rpartition(".")
        return module in self._factors and (leaf == "weight" or BIAS in self._factors[module].tensors)

    def merged(self, module: str, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the weights of a module with the LoRA merged into them, by their names in the module."""
        from peft import set_peft_model_state_dict

        base = copy.deepcopy(self._stock.get_submodule(module))
        base.load_state_dict(dict(weights), assign=True)
        holder, tensors = _with_layer(base, self._factors[module]), self._factors[module].tensors
        set_peft_model_state_dict(holder, {f"{LAYER}.{part}": tensor for part, tensor in tensors.items()})
        try:
            layer: Any = holder[LAYER]
            layer.scale_layer(self.scale)
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise CheckpointError(f"{self.file}: {module} is not finite with it; lower its scale") from error
        return dict(layer.get_base_layer().state_dict())

    def _check(self, module: str, factors: Factors, model: str) -> None:
        """Check that the file has the factors of peft's layer for a module. Raises ``CheckpointError``."""
        from peft import get_peft_model_state_dict

        base = copy.deepcopy(self._stock.get_submodule(module)).to("meta")
        try:
            holder = _with_layer(base, factors)
        except (TypeError, ValueError, NotImplementedError) as error:
            kind = type(base).__name__
            raise CheckpointError(f"{self.file}: {factors.key} is for a layer of type {kind}, not a linear") from error
        state = get_peft_model_state_dict(holder, state_dict=holder.state_dict())
        expected = {part.removeprefix(f"{LAYER}."): tensor for part, tensor in state.items()}
        if missing := expected.keys() - factors.tensors.keys():
            raise CheckpointError(f"{self.file}: {factors.key} needs {min(missing)} to go with it; save the LoRA again")
        if unknown := factors.tensors.keys() - expected.keys():
            raise CheckpointError(f"{self.file}: {factors.key} comes with {min(unknown)}, unknown for {module}")
        if BIAS in expected and base.bias is None:
            raise CheckpointError(f"{self.file}: {factors.key} comes with lora_B.bias, but {module} has no bias")
        for part, tensor in factors.tensors.items():
            if tensor.shape != expected[part].shape:
                raise CheckpointError(
                    f"{self.file}: {module}.{part} has shape {tuple(tensor.shape)}, {model} needs "
                    f"{tuple(expected[part].shape)}; give a LoRA made for this model"
                )


class MergedWeights(Mapping[str, Tensor]):
    """Weights with LoRAs merged into them, lazily, in the dtypes of the original weights.

    Each LoRA is merged into the original weight, and the changes are summed, so the order of LoRAs does not matter.
    """

    def __init__(self, weights: Mapping[str, Tensor], loras: Sequence[UserLora]) -> None:
        self._weights, self._loras = weights, loras

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name]
        loras = [lora for lora in self._loras if lora.changes(name)]
        if not loras:
            return weight
        merged = self._changed(name, loras).to(weight.dtype)
        if not merged.isfinite().all():
            files = " and ".join(str(lora.file) for lora in loras)
            raise CheckpointError(f"{name} is not finite in {weight.dtype} with {files}; lower the scale")
        return merged

    @torch.no_grad()
    def _changed(self, name: str, loras: Sequence[UserLora]) -> Tensor:
        module, _, leaf = name.rpartition(".")
        wide = torch.promote_types(self._weights[name].dtype, torch.float32)
        names = [part for part in ("weight", "bias") if f"{module}.{part}" in self._weights]
        base = {part: self._weights[f"{module}.{part}"].to(wide) for part in names}
        changes = [lora.merged(module, base)[leaf] - base[leaf] for lora in loras]
        return sum(changes, start=base[leaf])

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _with_layer(base: nn.Module, factors: Factors) -> nn.ModuleDict:
    """Make a model of one layer: peft's LoRA layer around a module, with new factors."""
    from peft import LoraConfig, inject_adapter_in_model

    holder = nn.ModuleDict({LAYER: base})
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # they concern what is checked here
        inject_adapter_in_model(LoraConfig(target_modules=[LAYER], **factors.options), holder)
    return holder
