"""The masked model, which a bundle must equal, with a stock module's signature."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from dyexport.bundle.reader import Bundle
from dyexport.checkpoints.dynamic import load_dynamic
from dyexport.verification.verify import find_reference


class Output(NamedTuple):
    sample: torch.Tensor


class Masked(torch.nn.Module):
    """In fp32 inside, in a pipeline of any dtype."""

    def __init__(self, bundle: Path, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model, _ = load_dynamic(find_reference(Bundle.open(bundle)))
        self.config, self.dtype, self.device = self.model.config, dtype, torch.device("cpu")

    @torch.no_grad()
    def forward(self, hidden_states: torch.Tensor, *, return_dict: bool = True, **inputs: Any) -> Any:
        given = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        given = {name: value.float() if value.is_floating_point() else value for name, value in given.items()}
        if "img_shapes" in inputs:  # one picture for each sample, all of one shape
            given["img_shapes"] = torch.tensor(inputs["img_shapes"][0][0])
        if "class_labels" in given:
            given["class_labels"] = given["class_labels"].clamp(max=self.config.num_embeds_ada_norm)
        sample = self.model({"hidden_states": hidden_states.float(), **given}).sample.to(hidden_states.dtype)
        return Output(sample) if return_dict else (sample,)

    def cache_context(self, name: str, **context: Any) -> Any:
        return torch.no_grad()
